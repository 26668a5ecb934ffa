"""One preset of a model: its parts, the file, and what each class reads of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from corrdit import CrossAttentionGuidance, MotionTransfer, PointTracker, load_backbone
from corrdit.integrations.diffusers import GuidancePreset, Preset, ReadingPreset, backbone_of
from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS, PublishedModel
from corrdit.integrations.diffusers.motion_transfer import TransferSettings
from corrdit.testing import tiny_backbone, tiny_pipeline
from corrdit.tracking import TrackerOptions
from corrdit.tracking.options import PUBLISHED_TRACKING

WHOLE = Preset(
    ReadingPreset(1, step=-2, inference_steps=10, head_weights=(0.0, 1.0)),
    TrackerOptions(layers=(1, 2), crops=(0.5,)),
    GuidancePreset((0, 2), renormalize=False),
    TransferSettings((2,), optimisation_steps=1),
)


def test_every_class_reads_the_preset_of_its_backbone():
    backbone = backbone_of(tiny_pipeline("cogvideox"), preset=WHOLE)
    assert PointTracker(backbone).options == WHOLE.tracking
    guidance = CrossAttentionGuidance(backbone)
    assert (guidance.layers, guidance.preset.renormalize) == ((0, 2), False)
    assert MotionTransfer(backbone).settings == WHOLE.transfer
    bare = CrossAttentionGuidance(backbone.pipe, preset=WHOLE)
    assert bare.layers == (0, 2)
    assert PointTracker(tiny_backbone("cogvideox"), preset=WHOLE).options == WHOLE.tracking
    with pytest.raises(ValueError, match="no layers to perturb were given"):
        CrossAttentionGuidance(backbone.pipe)


def test_the_embedded_model_is_guided_where_it_was_found_to_match_best():
    backbone = load_backbone("embedded")
    assert CrossAttentionGuidance(backbone).layers == (backbone.preset.reading.layer,) == (4,)
    assert CrossAttentionGuidance(backbone, 2).layers == (2,)
    assert PointTracker(backbone).layers == (4,)
    settings = MotionTransfer(backbone).settings
    assert (settings.blocks, settings.learning_rate, settings.steps) == ((4,), (0.05, 0.05), 20)
    steady = MotionTransfer(backbone, method="steady").settings
    assert (steady.blocks, steady.learning_rate, steady.steps) == ((4,), (0.002, 0.002), 20)


def test_a_preset_has_settings_for_further_methods(tmp_path):
    values = {"layer": 1, "transfer": {"steps": 7, "methods": {"smm": {"learning_rate": 0.3}, "moft": {"steps": 9}}}}
    preset = Preset.from_mapping(values)
    found = {method: preset.transfer_of(method) for method in ("ditflow", "smm", "moft")}
    assert {name: settings.method for name, settings in found.items()} == {name: name for name in found}
    assert [(settings.steps, settings.learning_rate[0]) for settings in found.values()] == [
        (7, 0.002),
        (7, 0.3),
        (9, 0.002),
    ]
    preset.save(tmp_path / "preset.json")
    assert Preset.from_file(tmp_path / "preset.json") == preset
    with pytest.raises(ValueError, match="methods of transfer must be changed settings by method"):
        Preset.from_mapping({"layer": 1, "transfer": {"methods": ["smm"]}})
    with pytest.raises(ValueError, match="method must be one of"):
        Preset.from_mapping({"layer": 1, "transfer": {"methods": {"smn": {}}}})


def test_layers_of_a_calibration_are_guided(tmp_path):
    (tmp_path / "preset.json").write_text('{"layer": 1, "guidance": {"layers": [2, 0]}, "source": "calibrated: x"}')
    backbone = load_backbone("embedded", preset=tmp_path / "preset.json")
    assert CrossAttentionGuidance(backbone).layers == (0, 2)
    settings = MotionTransfer(backbone).settings
    assert (settings.blocks, settings.learning_rate) == ((1,), (0.05, 0.05)), "the model's own, at the layer found"


def test_published_means_the_released_procedures_with_the_settings_for_the_shape(monkeypatch):
    own = load_backbone("embedded")
    backbone = load_backbone("embedded", preset="published")
    assert backbone.preset == own.preset.published()
    assert PointTracker(backbone).options == PointTracker(own, preset="published").options == PUBLISHED_TRACKING
    assert PointTracker(backbone, layer=2).options == replace(PUBLISHED_TRACKING, layer=2)
    assert CrossAttentionGuidance(backbone).preset.renormalize is None
    whole = replace(WHOLE, reading=replace(WHOLE.reading, head_weights=None))  # the model has other heads
    row = PublishedModel("x/y", "cogvideox", own.layers, own.heads, "float32", whole)
    monkeypatch.setitem(PUBLISHED_MODELS, "shape", row)
    assert load_backbone("embedded", preset="published").preset == whole.published()
    assert load_backbone("embedded", preset="default").preset == own.preset


@pytest.mark.parametrize("preset", [WHOLE, WHOLE.published(), *(row.preset for row in PUBLISHED_MODELS.values())])
def test_files_hold_all_of_it(preset, tmp_path):
    preset.save(tmp_path / "preset.json")
    assert Preset.from_file(tmp_path / "preset.json") == preset
    assert json.loads((tmp_path / "preset.json").read_text())["layer"] == preset.reading.layer


def test_files_of_earlier_versions_are_read():
    read = Preset.from_mapping({"layer": 1, "guidance_layers": [2, 0], "tracking": {"low_pass": 1.0}, "timestep": 19.0})
    assert read == Preset(ReadingPreset(1), TrackerOptions(layers=(1,), low_pass=1.0), GuidancePreset((2, 0)))
    backbone = backbone_of(tiny_pipeline("cogvideox"), preset=read)
    assert PointTracker(backbone).options.low_pass == 1.0
    assert PointTracker(backbone, layer=1).options.low_pass == 0.0, "they count only where no layer is asked for"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tracking": {"speed": 1}}, "unknown tracker option 'speed'"),
        ({"tracking": {"refine": -1}}, "refine must be a whole number of at least 0"),
        ({"guidance": {"layers": ["two"]}}, "guidance_layers must be a list of whole numbers"),
        ({"guidance": {"depth": 3}}, "guidance has an unknown entry 'depth'"),
        ({"guidance": [3]}, "guidance must be options of guidance by name"),
        ({"transfer": {"speed": 1}}, "unknown settings speed"),
        ({"source": 3}, "source must be a text"),
        ({"trackng": {}}, "an entry of a preset must be one of .*, got 'trackng'; did you mean tracking"),
        ({"layer": -1}, "layer must be a whole number of at least 0, got -1"),
        ({"height": 480}, "height and width of the encoded frames go together"),
    ],
)
def test_sections_that_cannot_be_used_are_named(section, message):
    with pytest.raises(ValueError, match=message):
        Preset.from_mapping({"layer": 1, **section})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "reading must be a ReadingPreset, such as ReadingPreset(layer=17), got None"),
        (("x",), {}, "reading must be a ReadingPreset, such as ReadingPreset(layer=17), got 'x'"),
        ((), {"step": -3}, "reading must be a ReadingPreset"),
        ((1,), {"steps": -3}, "an argument of a Preset must be one of layer, step,"),
        ((17, -3), {}, "tracking of a Preset must be TrackerOptions, got -3; as in Preset(ReadingPreset(layer=17, st"),
    ],
)
@pytest.mark.filterwarnings("ignore:Preset")
def test_what_makes_no_preset_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Preset(*arguments, **options)


@pytest.mark.parametrize("contents", ["[" * 100_000, '{"layer": ' + "[" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_files_nested_deeper_than_json_is_read_are_refused(tmp_path, contents):
    (tmp_path / "preset.json").write_text(contents)
    with pytest.raises(ValueError, match="is not a preset as `corrdit calibrate` writes it"):
        Preset.from_file(tmp_path / "preset.json")


def test_the_spelling_before_it_had_parts_still_works():
    with pytest.warns(DeprecationWarning, match=r"Preset\(head_weights, guidance_layers\) is now"):
        old = Preset(1, head_weights=(0.0, 1.0), guidance_layers=(2,))
    assert old == Preset(ReadingPreset(1, head_weights=(0.0, 1.0)), guidance=GuidancePreset((2,)))
    with pytest.warns(DeprecationWarning, match=r"Preset.layer is now Preset.reading.layer"):
        assert old.layer == 1
    with pytest.warns(DeprecationWarning, match=r"Preset.guidance_layers is now Preset.guidance.layers"):
        assert old.guidance_layers == (2,)
    with pytest.warns(DeprecationWarning, match="frames_per_chunk"):
        assert replace(old, frames_per_chunk=4).reading == ReadingPreset(1, head_weights=(0.0, 1.0), frames_per_chunk=4)
    with pytest.raises(AttributeError, match="depth"):
        _ = old.depth


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"tracking": -1}, "tracking of a Preset must be TrackerOptions, got -1"),
        ({"guidance": {"scale": 2.0}}, "guidance of a Preset must be GuidancePreset, got {'scale': 2.0}"),
        ({"transfer": {"steps": 2}}, "transfer of a Preset must be TransferSettings | None, got {'steps': 2}"),
        ({"source": 3}, "source of a Preset must be str, got 3"),
    ],
)
def test_parts_of_another_kind_are_refused(part, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Preset(ReadingPreset(1), **part)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"scale": "x"}, "scale must be a number, got 'x'"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"renormalize": "no"}, "renormalize must be True or False, got 'no'"),
    ],
)
def test_guidance_of_a_file_is_checked(entry, message):
    with pytest.raises(ValueError, match=message):
        Preset.from_mapping({"layer": 1, "guidance": entry})


def test_a_head_that_counts_nan_times_is_refused():
    """It counted nothing, in silence."""
    preset = Preset.from_mapping({"layer": 1, "head_weights": [float("nan"), 1.0]})
    with pytest.raises(ValueError, match=r"head_weights must be finite.*nan"):
        PointTracker(backbone_of(tiny_pipeline("cogvideox"), preset=preset))
