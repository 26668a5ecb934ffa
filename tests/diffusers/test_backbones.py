"""Backbones: loading, encoding, one forward with chosen layers, presets."""

from __future__ import annotations

import itertools
import json
import warnings
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

from corrdit import TokenGrid, load_backbone
from corrdit.integrations.diffusers import Preset, ReadingPreset, available_backbones, backbone_of
from corrdit.integrations.diffusers.backbones import loading
from corrdit.integrations.diffusers.backbones.published_models import preset_for
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_pipeline

EVERY = [pytest.param(name, marks=pytest.mark.slow) if model.variant else name for name, model in TINY_MODELS.items()]
SIZES = dict.fromkeys(("ltx", "ltx-image", "ltx2", "ltx2-image"), (64, 96))
VIDEO = np.random.default_rng(0).integers(0, 256, (6, 50, 70, 3), dtype=np.uint8)


def encoded(backbone, name):
    height, width = SIZES.get(name, (48, 64))
    return backbone.encode_frames(VIDEO, height=height, width=width)


def grid_of(q, k, grid, key_mask):
    return grid


@pytest.mark.filterwarnings("ignore:.*no text encoder")
@pytest.mark.parametrize("name", EVERY)
def test_saved_pipelines_load_and_run(name, saved_model):
    backbone = load_backbone(saved_model(name))
    original = tiny_backbone(name)
    for length in ("tokenizer_max_length", "tokenizer_2_max_length", "vision_num_semantic_tokens"):
        if name.startswith("hunyuanvideo15"):
            # Of 2,000 tokens of padding; a tiny pipeline has fewer, which no file says.
            setattr(backbone.pipe, length, getattr(original.pipe, length))
    latents = encoded(backbone, name)
    assert torch.equal(latents, encoded(original, name))
    dy, dx = backbone.token_stride
    height, width = SIZES.get(name, (48, 64))
    grid = backbone.grid(len(latents), *latents.shape[2:])
    assert (grid.frames, grid.height, grid.width) == (6, height // dy, width // dx)
    norms = {0: lambda q, k, grid, key_mask: (q.norm(), k.norm()), -1: {"grid": grid_of}}
    results = backbone.forward(latents, backbone.timestep(-1), norms)
    assert results[-1] == {"grid": grid}
    own = original.forward(encoded(original, name), original.timestep(-1), {0: norms[0]})
    assert torch.allclose(torch.stack(results[0]), torch.stack(own[0]), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no text encoder")
@pytest.mark.parametrize("name", EVERY)
def test_encoded_videos_follow_the_latent_frame_map(name):
    backbone = tiny_backbone(name)
    height, width = SIZES.get(name, (48, 64))
    latents = backbone.encode_video(VIDEO, height=height, width=width)
    frame_map = backbone.latent_frame_map(len(VIDEO))
    assert sorted(itertools.chain(*frame_map)) == list(range(len(VIDEO)))
    assert len(latents) == len(frame_map)
    assert frame_map[0][0] == 0
    batch = latents[None] if TINY_MODELS[name].packed else latents[None].repeat(2, 1, 1, 1, 1)
    grid = backbone.forward(batch, 300.0, {0: grid_of})[0]
    assert grid.frames == len(frame_map)


def test_latent_frame_map_of_cogvideox():
    assert tiny_backbone("cogvideox").latent_frame_map(9) == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert tiny_backbone("cogvideox").latent_frame_map(1) == [[0]]
    assert tiny_backbone("cogvideox-1.5").latent_frame_map(9) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert tiny_backbone("mochi").latent_frame_map(8) == [[0], [1, 2, 3, 4, 5, 6], [7]]


def test_every_frame_is_encoded_by_itself():
    backbone = tiny_backbone("cogvideox")
    together = backbone.encode_frames(VIDEO, height=48, width=64)
    alone = torch.cat([backbone.encode_frames(frame[None], height=48, width=64) for frame in VIDEO])
    assert torch.allclose(together, alone, atol=1e-5)
    same = np.repeat(VIDEO[:1], 3, axis=0)
    latents = backbone.encode_frames(same, height=48, width=64)
    assert torch.allclose(latents[0], latents[2], atol=1e-6)


def test_latents_are_scaled_as_the_pipeline_scales_them():
    """Encoding and the pipeline's own decoding give what the codec gives."""
    backbone = tiny_backbone("wan")
    frames = torch.from_numpy(VIDEO[:1, :48, :64]).permute(0, 3, 1, 2)[:, :, None].float() / 127.5 - 1
    raw = backbone.pipe.vae.encode(frames).latent_dist.mode()
    expected = (raw - 0.1) / 0.9
    assert torch.allclose(backbone.encode_frames(VIDEO[:1, :48, :64])[0], expected[0, :, 0], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*no text encoder")
@pytest.mark.parametrize("name", ["cogvideox-rotary", "wan", "ltx", "hunyuanvideo", "mochi"])
def test_forward_is_the_pipelines_first_call(name, generation):
    """Same latents, prompt and timestep as the pipeline's own: same queries."""
    from corrdit import capture

    pipe = tiny_pipeline(name)
    backbone = backbone_of(pipe)
    arguments = generation(name, guided=False)
    seen = {}

    def record(transformer, args, kwargs):
        seen.setdefault("call", {key: value for key, value in kwargs.items()})

    handle = pipe.transformer.register_forward_pre_hook(record, with_kwargs=True)
    with capture(pipe, layers=1, steps=[0], operation=lambda q, *_: q.clone()) as captured:
        pipe(**arguments)
    handle.remove()
    call = seen["call"]
    latents = call["hidden_states"]
    if name == "ltx":
        latents = pipe._unpack_latents(latents, call["num_frames"], call["height"], call["width"])
    if name != "cogvideox-rotary":
        latents = latents.transpose(1, 2)
    text = {key: call[key] for key in backbone.blank_prompt()}
    timestep = float(call["timestep"].flatten()[0])
    again = backbone.forward(latents, timestep, {1: lambda q, *_: q.clone()}, prompt_embeds=text)
    assert torch.allclose(again[1], captured[0, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*no text encoder")
def test_prompt_embeddings_and_gradients():
    backbone = tiny_backbone("hunyuanvideo")
    latents = encoded(backbone, "hunyuanvideo").requires_grad_()
    embeds = torch.randn(1, 5, 16)
    grids = backbone.forward(latents, 500.0, {0: grid_of}, prompt_embeds=embeds)
    assert grids[0].text_tokens == 5
    result = backbone.forward(latents, 500.0, {1: lambda q, k, *_: (q * k).sum()}, keep_graph=True)[1]
    assert torch.autograd.grad(result, latents)[0].abs().sum() > 0
    assert not backbone.forward(latents, 500.0, {1: lambda q, k, *_: (q * k).sum()})[1].requires_grad


def test_missing_text_encoder_is_said_once():
    backbone = tiny_backbone("ltx")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        latents = encoded(backbone, "ltx")
        for _ in range(2):
            backbone.forward(latents, 500.0, {0: grid_of})
    assert [str(entry.message) for entry in said if "no text encoder" in str(entry.message)] == [
        "tiny ltx has no text encoder; its empty prompt is taken as zeros"
    ]


def test_wan_2_2_chooses_its_transformer_by_noise():
    backbone = tiny_backbone("wan-2.2")
    assert backbone.transformer_at(900.0) is backbone.pipe.transformer
    assert backbone.transformer_at(100.0) is backbone.pipe.transformer_2


def test_timesteps_are_trailing_whatever_the_pipelines_spacing():
    backbone = tiny_backbone("cogvideox")
    from diffusers import CogVideoXDPMScheduler

    backbone.pipe.scheduler = CogVideoXDPMScheduler(timestep_spacing="leading")
    assert (backbone.timestep(0, 50), backbone.timestep(-1, 50), backbone.timestep(-1)) == (999.0, 19.0, 19.0)
    assert backbone.pipe.scheduler.config.timestep_spacing == "leading"
    for wrong in (0.5, True, "last"):
        with pytest.raises(ValueError, match="step must be whole numbers"):
            backbone.timestep(wrong, 50)
    with pytest.raises(ValueError, match="inference_steps must be a whole number of at least 1, got 0"):
        backbone.timestep(0, 0)
    for wrong in (50, -51):
        with pytest.raises(ValueError, match="outside a schedule of 50 steps"):
            backbone.timestep(wrong, 50)


@pytest.mark.parametrize("name", ["hunyuanvideo", "wan", "ltx", "mochi"])
def test_schedules_are_the_pipelines(name, generation):
    pipe = tiny_pipeline(name)
    if name == "ltx":
        # The pipeline shifts time by the size of the video; the backbone as for the longest.
        pipe.scheduler.register_to_config(base_shift=1.15)
    backbone = backbone_of(pipe)
    pipe(**generation(name, steps=4, guided=False))
    assert torch.allclose(backbone.schedule(4), pipe.scheduler.timesteps.cpu(), rtol=1e-5)
    noisy, clean = torch.ones(1), torch.zeros(1)
    first, last = backbone.timestep(0, 4), backbone.timestep(-1, 4)
    assert backbone.add_noise(clean, noisy, first) == 1
    assert 0 < backbone.add_noise(clean, noisy, last) < 1


def test_presets():
    assert preset_for("cogvideox", 30, 30).reading.layer == 17
    assert preset_for("cogvideox", 42, 48).reading.layer == 17
    hunyuan = preset_for("hunyuanvideo", 60, 24).reading
    assert (hunyuan.layer, hunyuan.step, hunyuan.inference_steps) == (16, 29, 30)
    assert (hunyuan.height, hunyuan.width, hunyuan.frames_per_chunk) == (480, 720, 13)
    unknown = preset_for("wan", 40, 40)
    assert unknown.reading.layer == 23
    assert "nothing is published" in unknown.source
    with pytest.raises(ValueError, match="needs a layer"):
        Preset.from_mapping({"step": 3})
    with pytest.raises(ValueError, match="reads layer 9, but there are 3 layers"):
        backbone_of(tiny_pipeline("wan"), preset=Preset(ReadingPreset(9)))


@pytest.mark.filterwarnings("ignore:.*no text encoder")
def test_preset_beside_the_weights(tmp_path):
    tiny_pipeline("wan").save_pretrained(tmp_path)
    preset = {"layer": 1, "head_weights": [0.0, 1.0], "frames_per_chunk": 4}
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    assert load_backbone(str(tmp_path)).preset == Preset(ReadingPreset(1, head_weights=(0.0, 1.0), frames_per_chunk=4))
    (tmp_path / "preset.json").write_text(json.dumps({**preset, "of a later version": True}))
    with pytest.raises(ValueError, match=r"must be one of layer, step, .*, got 'of a later version'"):
        load_backbone(str(tmp_path))


def test_entry_points_of_other_packages(monkeypatch):
    point = EntryPoint("outside", "corrdit.testing:tiny_backbone", loading.ENTRY_POINT_GROUP)
    monkeypatch.setattr(loading, "entry_points", lambda group: [point] if group == "corrdit.backbones" else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda device, dtype: tiny_backbone("ltx"))
    assert load_backbone("outside").family == "ltx"
    rows = {row["name"]: row for row in available_backbones()}
    assert rows["outside"]["source"] == "corrdit.testing:tiny_backbone (entry point)"
    assert rows["cogvideox-2b"]["preset"].reading.layer == 17
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda device, dtype: "a string")
    with pytest.raises(ValueError, match="returned str"):
        load_backbone("outside")


@pytest.mark.parametrize("name", ["nonsense", "./missing", "/missing/folder", "a/b/c", ""])
def test_unknown_names_list_what_is_accepted(name):
    with pytest.raises(ValueError, match=r"unknown model .* accepted are embedded, cogvideox-2b"):
        load_backbone(name)


@pytest.mark.parametrize("name", ["nobody/nothing", "cogvideox-2b"])
def test_hub_ids_while_offline(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"offline .* not in the local cache"):
        load_backbone(name)


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    asked = []

    def unreachable(url, **options):
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(ValueError, match=r"nobody/nothing: it is not in the local cache and the hub cannot be reached"):
        load_backbone("nobody/nothing")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("embedded", {"device": "gpu"}, "device 'gpu' cannot be used on this machine"),
        ("embedded", {"dtype": "float61"}, "dtype must be one of .*, got 'float61'; did you mean float64"),
        ("embedded", {"dtype": torch.int8}, "dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ("embeded", {}, "unknown model 'embeded'; did you mean embedded"),
        ("cogvideox2b", {}, "unknown model 'cogvideox2b'; did you mean cogvideox-2b"),
        (None, {}, "a string or a path, got a NoneType"),
    ],
)
def test_wrong_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(name, **options)


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "bfloat16"])
def test_a_dtype_by_its_name(name):
    assert load_backbone("embedded", dtype=name).dtype == torch.bfloat16


def test_folders_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "PipelineOfTomorrow"}')
    with pytest.raises(ValueError, match="PipelineOfTomorrow, which this diffusers"):
        load_backbone(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="is not a model index"):
        load_backbone(tmp_path)


def test_pipelines_without_a_known_transformer():
    class Pipe:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Linear is not a known video transformer"):
        backbone_of(Pipe())
    with pytest.raises(ValueError, match="has no transformer"):
        backbone_of(object())


@pytest.mark.parametrize(
    ("video", "sizes", "message"),
    [
        (VIDEO.astype(np.float32), {}, r"uint8 \[T, H, W, 3\]"),
        (VIDEO[0], {}, r"uint8 \[T, H, W, 3\]"),
        (VIDEO[:0], {}, r"uint8 \[T, H, W, 3\]"),
        (VIDEO, {"height": 50, "width": 64}, "height 50 is not a multiple of 16, .* give height=48"),
        (VIDEO, {"height": 48}, "width 70 is not a multiple of 16, .* give width=64"),
    ],
)
def test_videos_that_do_not_fit(video, sizes, message):
    with pytest.raises(ValueError, match=message):
        tiny_backbone("cogvideox").encode_frames(video, **sizes)


def test_latents_that_do_not_fit():
    backbone = tiny_backbone("cogvideox")
    with pytest.raises(ValueError, match=r"latents must be \[F, 4, h, w\]"):
        backbone.forward(torch.zeros(2, 3, 8, 8), 19.0, {0: grid_of})
    with pytest.raises(ValueError, match="operations is empty"):
        backbone.forward(torch.zeros(2, 4, 8, 8), 19.0, {})
    with pytest.raises(ValueError, match="latent height 7 is not a multiple"):
        backbone.grid(2, 7, 8)
    latents = torch.zeros(2, 4, 8, 8)
    for operations, message in (
        ({3: grid_of}, "layer 3 is outside"),
        ({True: grid_of}, "True and False are no numbers"),
        ({0: grid_of, -3: max}, "layers 0 and -3 are the same one of 3"),
        ([grid_of], "operations must be a dict"),
    ):
        with pytest.raises(ValueError, match=message):
            backbone.forward(latents, 19.0, operations)
    with pytest.raises(ValueError, match="encoder_hidden_states has 3 samples and the latents 1"):
        backbone.forward(latents, 19.0, {0: grid_of}, prompt_embeds=torch.zeros(3, 8, 16))
    assert backbone.forward(latents.numpy(), 19.0, {0: grid_of})[0].frames == 2


def test_cogvideox_1_5_has_positions_for_a_largest_size():
    backbone = tiny_backbone("cogvideox-1.5")
    with pytest.raises(ValueError, match="up to 256 x 256 pixels, got 272 x 64"):
        backbone.forward(torch.zeros(1, 8, 34, 8), 19.0, {0: grid_of}, prompt_embeds=torch.zeros(1, 8, 16))


def test_a_backbone_of_another_package_brings_its_layout():
    """A subclass under another class name, as a third party would write it, passes the conformance suite."""
    from corrdit.integrations.diffusers.backbones.wan import WanBackbone, WanLayout
    from corrdit.testing import check_backbone

    class RenamedLayout(WanLayout):
        pass

    class RenamedBackbone(WanBackbone):
        family = "renamed"
        layout = RenamedLayout

    pipe = tiny_pipeline("wan")
    bases = type(pipe.transformer).__mro__[1:]
    renamed = type("RenamedTransformer", bases, dict(vars(type(pipe.transformer))))
    pipe.transformer.__class__ = renamed
    with pytest.raises(ValueError, match="RenamedTransformer is not a known video transformer"):
        backbone_of(pipe)
    backbone = RenamedBackbone(pipe, name="renamed", preset=Preset(ReadingPreset(1)))
    results = check_backbone(backbone, only=("grid", "attention reproduced", "token order"))
    assert len(results) == 3


def test_heads_and_text_of_the_grid():
    backbone = tiny_backbone("wan")
    assert (backbone.layers, backbone.heads, backbone.family, backbone.frames_per_token) == (3, 2, "wan", 1)
    assert backbone.grid(2, 8, 6) == TokenGrid(2, 4, 3)


def test_embedded_model():
    backbone = load_backbone("embedded")
    latents = backbone.encode_frames(np.repeat(VIDEO, 2, axis=0)[:8], height=48, width=64)
    grid = backbone.grid(8, *latents.shape[2:])
    read = backbone.preset.reading
    masses = backbone.forward(latents, backbone.timestep(read.step), {read.layer: grid_of})
    assert masses[read.layer] == grid
    assert grid.text_first
    assert "embedded" in {row["name"] for row in available_backbones()}
