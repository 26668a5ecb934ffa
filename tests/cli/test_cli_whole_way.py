"""From a video file to tracks through a real pipeline with random weights, by the command a user types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corrdit.cli import main
from corrdit.integrations.diffusers.testing.tiny_models import TINY_MODELS, tiny_pipeline
from corrdit.tracking import Tracks

FIRST = ("cogvideox", "hunyuanvideo", "ltx", "mochi", "wan")
OFTEN = [
    name if name.partition("-")[0] in FIRST and not model.variant else pytest.param(name, marks=pytest.mark.slow)
    for name, model in TINY_MODELS.items()
]
"""The others are tracked with in another test, in the same way but for the command line."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("cogvideox-rotary").save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*has no text encoder")
@pytest.mark.parametrize("name", OFTEN)
def test_every_family_tracks_from_a_folder(
    name: str, clip: Path, tmp_path: Path, saved_model: Callable[[str], Path]
) -> None:
    folder = saved_model(name)
    size = ["--size", "64x64", "--frames-per-chunk", "4", "--points", "grid:2"]
    command = ["track", str(clip), "--model", str(folder), *size]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    tracks = Tracks.load(tmp_path / "out" / "tracks.npz")
    assert (tracks.frames, tracks.points) == (6, 4)
    np.testing.assert_allclose(tracks.xy[0, 0], (16, 12))
    assert bool(tracks.xy.isfinite().all())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tracks.json",
        "tracks.npz",
        "tracks.mp4",
        "tracks.png",
    }


@pytest.mark.filterwarnings("ignore:.*has no text encoder")
def test_track_with_a_pipeline_from_a_folder(model: Path, clip: Path, tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text("0,10,10\n0,40.5,30\n3,20,20\n")
    size = ["--size", "64x64", "--frames-per-chunk", "4"]
    arguments = ["track", str(clip), "--model", str(model), "--points", str(points), *size]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    tracks = Tracks.load(tmp_path / "out" / "tracks.npz")
    assert (tracks.frames, tracks.points) == (6, 3)
    np.testing.assert_array_equal(tracks.xy[3, 2], (20, 20))
    assert bool(tracks.visible[3, 2])
    assert bool(((tracks.xy >= 0) & (tracks.xy <= 64)).all())
    assert main([*arguments, "--output", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(Tracks.load(tmp_path / "again" / "tracks.npz").xy, tracks.xy)


def test_wrong_models_and_options(
    model: Path, clip: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for name, expected in (
        ("cogvid", "unknown model 'cogvid'; did you mean cogvideox-5b?; accepted are embedded"),
        (tmp_path / "empty", "no model_index.json"),
        (tmp_path / "nowhere", "unknown model"),
    ):
        assert expected in refused("track", clip, "--model", name, "--output", tmp_path / "out")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("track", clip, "--model", "THUDM/CogVideoX-2b", "--output", tmp_path / "out")
    assert "cannot load THUDM/CogVideoX-2b: offline (HF_HUB_OFFLINE is set)" in line
    for option, value, expected in (
        ("--layer", "9", "layer must be from 0 to"),
        ("--schedule", "random", "schedule must be one of"),
        ("--size", "64", "64 is not a size; accepted is HEIGHTxWIDTH in pixels, such as 480x720"),
    ):
        line = refused("track", clip, "--model", model, "--output", tmp_path / "out", option, value)
        assert expected in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
