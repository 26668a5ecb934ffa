"""--preset: a name, or a file that `corrdit calibrate` wrote, is what every command reads the model with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from corrdit import PointTracker, load_backbone
from corrdit.cli import main
from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer
from corrdit.tracking import Tracks
from corrdit.video import read_video, write_video

Refused = Callable[..., str]
PRESET = {"layer": 1, "step": -2, "inference_steps": 4, "heads": "logits", "head": 1, "source": "calibrated: by hand"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_pipeline(build_transformer(layers=3, heads=2, head_dim=16, frames=4, size=32)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    blocks = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    write_video(path, blocks.repeat(4, axis=1).repeat(4, axis=2), 8)
    return path


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "preset.json"
    path.write_text(json.dumps(PRESET))
    return path


@pytest.mark.parametrize("as_folder", [False, True])
def test_track_reads_the_model_as_the_file_says(
    model: str, video: Path, preset: Path, tmp_path: Path, as_folder: bool
) -> None:
    given = video.parent if as_folder else video
    arguments = ["track", str(given), "--model", model, "--points", "grid:3", "--output"]
    assert main([*arguments, str(tmp_path / "out"), "--preset", str(preset)]) == 0
    found = tmp_path / "out" / ("clip.mp4/tracks.npz" if as_folder else "tracks.npz")
    with np.load(found) as archive:
        queries = archive["queries"]
    frames = read_video(video).frames
    expected = PointTracker(load_backbone(model, preset=preset)).track(frames, queries)
    assert torch.allclose(Tracks.load(found).xy, expected.xy, atol=1e-4)
    other = PointTracker(load_backbone(model)).track(frames, queries)
    assert not torch.allclose(expected.xy, other.xy, atol=1e-2)
    if as_folder:
        # With the model's own preset these are results of other settings.
        assert main([*arguments, str(tmp_path / "out")]) == 2


def test_evaluate_keeps_it_in_the_settings(model: str, preset: Path, tmp_path: Path) -> None:
    world = tmp_path / "world"
    size = ["--videos", "1", "--num-frames", "4", "--size", "32x32", "--points", "4"]
    assert main(["world", "--output", str(world), *size]) == 0
    arguments = ["evaluate", "--data", str(world), "--model", model, "--trainer.accelerator", "cpu"]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--preset", str(preset)]) == 0
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())["trackers"]["ours"]
    assert (kept["preset.layer"], kept["preset.step"], kept["preset.head"]) == (1, -2, 1)
    assert kept["weights"].startswith("float32 ")
    assert main([*arguments, "--preset", str(preset)]) == 0
    assert main(arguments) == 2


def test_generate_guides_the_layer_it_names(
    model: str, preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a red disc", "--model", model, "--num-frames", "4", "--steps", "1", "--cag"]
    assert main([*arguments, "--preset", str(preset), "--output", str(tmp_path / "out")]) == 0
    assert "guided in layers 1" in capsys.readouterr().out


def test_transfer_compares_the_layer_it_names(model: str, video: Path, preset: Path, tmp_path: Path) -> None:
    short = ["--steps", "1", "--guided-share", "1.0", "--optimisation-steps", "1", "--metrics", "false"]
    arguments = ["transfer", str(video), "a red disc", "--model", model, *short]
    assert main([*arguments, "--preset", str(preset), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["blocks"] == [1]


def test_analyze_begins_from_it(model: str, preset: Path, tmp_path: Path) -> None:
    arguments = ["analyze", "--world", "1", "--num-frames", "4", "--size", "32x32", "--model", model]
    arguments += ["--layers", "1", "--steps", "3", "--pictures", "0", "--preset", str(preset)]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["preset"]["inference_steps"] == 4


def test_published_means_the_same_on_every_command(
    model: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", model, "--preset", "published", "--output"]
    assert main(["track", str(video), "--points", "grid:3", *given, str(tmp_path / "track")]) == 0
    with np.load(tmp_path / "track" / "tracks.npz") as archive:
        queries = archive["queries"]
    frames = read_video(video).frames
    expected = PointTracker(load_backbone(model, preset="published")).track(frames, queries)
    assert torch.allclose(Tracks.load(tmp_path / "track" / "tracks.npz").xy, expected.xy, atol=1e-4)
    by_name = PointTracker(load_backbone(model), preset="published").track(frames, queries)
    assert torch.equal(by_name.xy, expected.xy)
    short = ["--steps", "1", "--guided-share", "1.0", "--optimisation-steps", "1", "--metrics", "false"]
    assert main(["transfer", str(video), "a red disc", *short, *given, str(tmp_path / "transfer")]) == 0
    capsys.readouterr()
    assert (
        main(["generate", "a red disc", "--num-frames", "4", "--steps", "1", "--cag", *given, str(tmp_path / "g")]) == 0
    )
    layer = load_backbone(model).preset.reading.layer
    assert f"guided in layers {layer}" in capsys.readouterr().out


COMMANDS = {
    "track": ["VIDEO"],
    "evaluate": ["--data", "VIDEO"],
    "generate": ["a red disc"],
    "transfer": ["VIDEO", "a red disc"],
    "analyze": ["--world", "1"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "contents, message",
    [
        (None, "there is no preset file"),
        ("not JSON", "is not a preset as `corrdit calibrate` writes it"),
        ("[1, 2]", "it holds a list"),
        ('{"step": 3}', "a preset needs a layer"),
        ('{"layer": "two"}', "layer must be a whole number of at least 0, got 'two'"),
        ('{"layer": 1, "heads": "all"}', "heads must be one of probabilities, logits"),
        ('{"layer": 1, "head_weights": [1, "x"]}', "head_weights must be a list of numbers"),
        ('{"layer": 1, "inference_steps": 0}', "inference_steps must be a whole number of at least 1, got 0"),
        ('{"layer": 1, "noise": 1}', "noise must be true or false"),
        ('{"layer": 1, "tracking": [1]}', "tracking must be options of the tracker by name"),
    ],
)
def test_a_bad_file_is_one_line(
    video: Path, tmp_path: Path, refused: Refused, command: str, contents: str | None, message: str
) -> None:
    file = tmp_path / "preset.json"
    if contents is not None:
        file.write_text(contents)
    arguments = [str(video) if part == "VIDEO" else part for part in COMMANDS[command]]
    line = refused(command, *arguments, "--output", tmp_path / "out", "--preset", file)
    assert message in line
    assert str(file) in line
    assert not (tmp_path / "out").exists()


def test_a_layer_the_model_does_not_have(model: str, video: Path, tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "preset.json"
    file.write_text('{"layer": 7}')
    line = refused("track", video, "--model", model, "--output", tmp_path / "out", "--preset", file)
    assert "reads layer 7, but there are 3 layers" in line
