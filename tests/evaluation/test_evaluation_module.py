"""EvaluationModule and TapVidDataModule under a Trainer of one process."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from corrdit import PointTracker, Tracks, metrics
from corrdit.data import TapVidSet, read_tapvid, write_tapvid_shards
from corrdit.data.restricted_pickle import load_arrays
from corrdit.evaluation import EvaluationResults
from corrdit.integrations.diffusers.fingerprint import model_facts
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.lightning import EvaluationModule, TapVidDataModule
from corrdit.integrations.lightning.data_modules import EachOnceSampler, Samples
from corrdit.metrics.tapvid import METRIC_NAMES
from corrdit.video import read_video

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no text encoder"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def table(output) -> dict:
    return {row["tracker"]: row for row in json.loads((output / "table.json").read_text())["trackers"]}


def evaluate(trainer, output, path, data=None, **options):
    trainer.predict(EvaluationModule(output=output, **options), TapVidDataModule(path, **(data or {})))
    return table(output)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_video_is_on_one_process(davis, processes):
    data = TapVidDataModule(davis)
    data.setup("predict")
    dataset = Samples(data.pending, data.sample)
    samplers = [EachOnceSampler(dataset, processes, rank, neighbours=True) for rank in range(processes)]
    assert [index for sampler in samplers for index in sampler] == list(range(5))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]


@pytest.mark.parametrize("mode", ["first", "strided", "frame_0"])
def test_figures_are_the_means_of_the_published_metric(davis, trainer, tmp_path, mode):
    from corrdit.tracking.baselines import nearest_patches, standing_still

    found = evaluate(
        trainer,
        tmp_path,
        davis,
        {"mode": mode, "stride": 2},
        trackers={"still": {}, "p": {"kind": "patches", "radius": 1}},
    )
    functions = {
        "still": lambda video, queries: standing_still(queries, len(video)),
        "p": lambda video, queries: nearest_patches(video, queries, radius=1),
    }
    for label, track in functions.items():
        figures = []
        for video in read_tapvid(davis):
            sample = video.sample(mode, stride=2)
            if len(sample.queries):
                figures.append(metrics.tapvid(**sample.metric_arguments(track(sample.video, sample.queries))))
        for name in METRIC_NAMES:
            assert found[label][name] == pytest.approx(np.mean([video[name][0] for video in figures]), abs=1e-12)
        assert (found[label]["videos"], found[label]["videos_without_visible_points"]) == (4, ["night"])


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("cogvideox-rotary")


MODEL_OPTIONS = {"backend": "reference", "height": 32, "width": 48, "layer": 0}


def test_the_model_is_asked_as_the_tracker_asks_it(world, backbone, trainer, tmp_path):
    module = EvaluationModule(backbone, output=tmp_path, trackers=["ours", "released"], tracker_options=MODEL_OPTIONS)
    trainer.predict(module, TapVidDataModule(world, end=1))
    sample = TapVidSet(world).read(TapVidSet(world).index()[0]).sample()
    for label, preset in (("ours", "default"), ("released", "published")):
        direct = PointTracker(backbone, preset=preset, **MODEL_OPTIONS).track(sample.video, sample.queries)
        kept = Tracks.load(EvaluationResults(tmp_path).tracks_file(label, "0000"))
        assert torch.equal(kept.xy, direct.xy)
        record = EvaluationResults(tmp_path).record(label, "0000")
        expected = metrics.tapvid(**sample.metric_arguments(direct))
        assert record["figures"]["average_jaccard"] == expected["average_jaccard"][0]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["trackers"]["released"] == {
        "kind": "released", "model": "tiny cogvideox-rotary", "dtype": None, **Placement().described(),
        **model_facts(backbone), **MODEL_OPTIONS,
    }  # fmt: skip


def test_other_weights_or_another_preset_of_the_same_name_are_refused(world, trainer, tmp_path):
    given = {"trackers": ["ours"], "tracker_options": MODEL_OPTIONS}
    trained = tiny_backbone("cogvideox-rotary")
    trainer.predict(EvaluationModule(trained, output=tmp_path, **given), TapVidDataModule(world, end=1))
    with torch.no_grad():
        trained.transformer.proj_out.bias += 1e-3
    with pytest.raises(ValueError, match=r"other settings of ours: weights 'float32 \w+' \(now 'float32 \w+'\); give"):
        trainer.predict(EvaluationModule(trained, output=tmp_path, **given), TapVidDataModule(world, end=1))
    again = tiny_backbone("cogvideox-rotary")
    again.preset = replace(again.preset, reading=replace(again.preset.reading, frames_per_chunk=3))
    with pytest.raises(ValueError, match=r"preset.frames_per_chunk 13 \(now 3\); give"):
        trainer.predict(EvaluationModule(again, output=tmp_path, **given), TapVidDataModule(world, end=1))
    data = TapVidDataModule(world, end=1)
    trainer.predict(EvaluationModule(tiny_backbone("cogvideox-rotary"), output=tmp_path, **given), data)
    assert data.pending == []


def test_features_before_and_after_the_projection_go_through_the_same_tracker(world, backbone, trainer, tmp_path):
    trackers = {
        "keys": {"kind": "ours"},
        "before": {"kind": "features"},
        "after": {"kind": "features", "feature": "projected output"},
        "cropped": {"kind": "features", "crops": (0.5,)},
    }
    module = EvaluationModule(backbone, output=tmp_path, trackers=trackers, tracker_options=MODEL_OPTIONS)
    trainer.predict(module, TapVidDataModule(world, end=1))
    results = EvaluationResults(tmp_path)
    tracks = {label: Tracks.load(results.tracks_file(label, "0000")).xy for label in trackers}
    assert not torch.equal(tracks["before"], tracks["keys"])
    assert not torch.equal(tracks["before"], tracks["after"])
    assert len(tracks["before"]) == 5


def test_part_of_a_set_and_short_videos(davis, trainer, tmp_path):
    evaluate(trainer, tmp_path, davis, {"start": 1, "end": 3, "max_frames": 3}, trackers="still")
    results = EvaluationResults(tmp_path)
    assert results.settings()["videos"] == ["camel", "dog"]
    assert results.record("still", "camel")["frames"] == 3
    assert not results.is_done(["still"], "bear")


def test_a_finished_run_does_nothing_again_and_another_tracker_joins(davis, trainer, tmp_path):
    evaluate(trainer, tmp_path, davis, trackers="still")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").rglob("*.json")}
    data = TapVidDataModule(davis)
    module = EvaluationModule(output=tmp_path, trackers="still")
    trainer.predict(module, data)
    assert data.pending == []
    assert len(module.finish()) == 1
    evaluate(trainer, tmp_path, davis, trackers=["still", "patches"])
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert list(table(tmp_path)) == ["still", "patches"]
    with pytest.raises(ValueError, match=r"other settings of data: mode 'first' \(now 'strided'\)"):
        evaluate(trainer, tmp_path, davis, {"mode": "strided"}, trackers="still")


def broken_davis(davis, folder):
    contents = load_arrays(davis)
    contents["cow"] = {
        "video": contents["bear"]["video"][:, :, :, :2],
        **{k: contents["bear"][k] for k in ("points", "occluded")},
    }
    path = folder / "broken.pkl"
    path.write_bytes(pickle.dumps(contents))
    return path


def test_a_broken_video_stops_the_run_which_goes_on_when_it_is_skipped(davis, trainer, tmp_path):
    path, output = broken_davis(davis, tmp_path), tmp_path / "output"
    with pytest.raises(ValueError, match=r"video cow .* tracker still: .*frames must be uint8"):
        evaluate(trainer, output, path, trackers="still")
    stopped = table(output)["still"]
    assert list(stopped["broken_videos"]) == ["cow"]
    assert stopped["videos_left"] == ["dog", "goat", "night"]
    found = evaluate(trainer, output, path, trackers="still", on_broken="skip")["still"]
    whole = evaluate(trainer, tmp_path / "whole", davis, trackers="still")["still"]
    assert list(found["broken_videos"]) == ["cow"]
    assert found["videos_left"] == []
    for name in ("videos", *METRIC_NAMES):
        assert found[name] == whole[name]


def test_a_truncated_shard_is_counted_and_its_videos_are_not_averaged(videos, trainer, tmp_path):
    write_tapvid_shards(tmp_path / "set", videos[:3], count=3, shards=3)
    shard = tmp_path / "set" / "0001_of_0003.pkl"
    shard.write_bytes(shard.read_bytes()[:300])
    found = evaluate(trainer, tmp_path / "output", tmp_path / "set", trackers="still", on_broken="skip")["still"]
    assert (found["videos"], list(found["broken_videos"])) == (2, ["0001_of_0003.pkl"])


def test_latents_that_are_not_numbers_are_named_and_not_averaged(world, trainer, tmp_path):
    backbone = tiny_backbone("cogvideox-rotary")
    encode, calls = backbone.encode_frames, []

    def sometimes_broken(video, **size):
        """Breaks the codec for the second video only."""
        calls.append(len(calls))
        weight = next(backbone.pipe.vae.encoder.parameters())
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan") if len(calls) == 2 else 0.5)
        try:
            return encode(video, **size)
        finally:
            with torch.no_grad():
                weight.copy_(kept)

    backbone.encode_frames = sometimes_broken
    module = EvaluationModule(
        backbone, output=tmp_path, trackers="ours", tracker_options=MODEL_OPTIONS, on_broken="skip"
    )
    trainer.predict(module, TapVidDataModule(world))
    found = table(tmp_path)["ours"]
    assert found["videos"] == 2
    assert list(found["broken_videos"]) == ["0001"]
    assert "latents that are NaN or infinite" in found["broken_videos"]["0001"]
    assert all(np.isfinite(found[name]) for name in METRIC_NAMES)


def test_a_layer_the_model_does_not_have_is_refused_before_any_video(world, backbone, trainer, tmp_path):
    module = EvaluationModule(backbone, output=tmp_path, trackers="ours", tracker_options={"layer": 99})
    with pytest.raises(ValueError, match=r"tracker ours: layer must be from 0 to 2 .* got 99"):
        trainer.predict(module, TapVidDataModule(world))
    assert list(tmp_path.iterdir()) == []


def test_trails_are_as_long_as_asked_for(davis, trainer, tmp_path):
    for trail in (0, 4):
        output = tmp_path / str(trail)
        evaluate(trainer, output, davis, {"end": 1}, trackers="patches", pictures=1, trail=trail)
    films = [read_video(tmp_path / trail / "pictures" / "truth" / "bear.mp4").frames for trail in "04"]
    assert np.abs(films[0][0].astype(int) - films[1][0]).max() < 30
    assert np.abs(films[0][-1].astype(int) - films[1][-1]).max() > 60
    with pytest.raises(ValueError, match="trail must be a whole number"):
        EvaluationModule(output=tmp_path / "none", trail=-1)


def test_pictures_of_the_first_videos(davis, trainer, tmp_path):
    evaluate(trainer, tmp_path, davis, {"end": 3}, trackers="still", pictures=2, save_tracks=False)
    drawn = sorted(
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "pictures").rglob("*") if path.is_file()
    )
    names = [f"{name}.{kind}" for name in ("bear", "camel") for kind in ("mp4", "png")]
    assert drawn == [f"pictures/{label}/{name}" for label in ("still", "truth") for name in names]
    assert not list((tmp_path / "videos").rglob("*.npz"))


def test_testing_logs_the_means(davis, trainer, tmp_path):
    (logged,) = trainer.test(
        EvaluationModule(output=tmp_path, trackers="still"), TapVidDataModule(davis), verbose=False
    )
    assert logged["still/average_jaccard"] == pytest.approx(table(tmp_path)["still"]["average_jaccard"], abs=1e-6)


def test_lightning_cli_builds_both_from_a_file(davis, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate"])
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "config.yaml"
    config.write_text(
        f"model:\n  output: {tmp_path / 'output'}\n  trackers: [still, patches]\n  on_broken: skip\n"
        f"data:\n  path: {davis}\n  mode: strided\n"
        "trainer:\n  accelerator: cpu\n  devices: 1\n  logger: false\n  enable_checkpointing: false\n"
        "  enable_progress_bar: false\n  enable_model_summary: false\n"
    )
    cli = LightningCLI(
        EvaluationModule, TapVidDataModule, args=["--config", str(config)], run=False, save_config_callback=None
    )
    cli.trainer.predict(cli.model, cli.datamodule)
    assert list(table(tmp_path / "output")) == ["still", "patches"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: EvaluationModule(output=folder, on_broken="ignore"), "on_broken must be one of"),
        (lambda folder: EvaluationModule(output=folder, dtype="float12"), "dtype must be one of"),
        (lambda folder: EvaluationModule(output=folder, placement="moon"), "placement must be one of"),
        (lambda folder: EvaluationModule(output=folder, trackers="best"), "unknown tracker"),
        (lambda folder: EvaluationModule(output=folder, model_preset=folder / "absent"), "there is no preset file"),
        (lambda folder: EvaluationModule(object(), output=folder, model_preset="p"), "a model that is loaded by name"),
        (lambda folder: EvaluationModule(output=folder, queries_at_once=0), "queries_at_once must be"),
        (lambda folder: TapVidDataModule(folder / "absent.pkl"), "does not exist"),
        (lambda folder: TapVidDataModule(folder, mode="last"), "mode must be one of"),
        (lambda folder: EvaluationModule(output=folder).setup("fit"), "has no fit step"),
    ],
)
def test_arguments_are_refused(tmp_path, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path)


def test_numbers_beyond_the_set_are_refused(davis, trainer, tmp_path):
    with pytest.raises(ValueError, match="no video from number 9 to the end; it has 5"):
        evaluate(trainer, tmp_path, davis, {"start": 9}, trackers="still")


def test_other_data_than_of_the_data_module_are_refused(trainer, tmp_path):
    loader = torch.utils.data.DataLoader([{"name": "a"}])
    with pytest.raises(ValueError, match="give the Trainer one"):
        trainer.predict(EvaluationModule(output=tmp_path, trackers="still"), loader)


@pytest.mark.parametrize("placement", ["offload", "offload_layers", "shards"])
def test_placements_need_a_gpu_and_a_model_by_name(world, backbone, trainer, tmp_path, placement):
    for model, message in (("embedded", "this process has none"), (backbone, "loaded already")):
        module = EvaluationModule(model, output=tmp_path, trackers="ours", placement=placement)
        with pytest.raises(ValueError, match=message):
            trainer.predict(module, TapVidDataModule(world))
