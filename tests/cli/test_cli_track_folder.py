"""`corrdit track` on a folder of videos: all of them, once, going on after a stop, over processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corrdit.cli import main
from corrdit.cli.track import is_folder_of_videos
from corrdit.integrations.diffusers.testing.tiny_models import tiny_pipeline
from corrdit.tracking import Tracks
from corrdit.video import write_video

pytestmark = pytest.mark.filterwarnings("ignore:.*has no text encoder")
SIZE = ["--size", "64x64", "--points", "grid:2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline("cogvideox-rotary").save_pretrained(folder)
    return folder


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two videos, one in a subfolder, and a third that is broken."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, frames in (("a.mp4", 3), ("more/b.gif", 4)):
        blocks = random.integers(0, 255, (frames, 4, 4, 3), dtype=np.uint8)
        write_video(folder / name, blocks.repeat(12, axis=1).repeat(16, axis=2))
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


def test_every_video_is_tracked_and_the_broken_one_named(
    model: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["track", str(videos), "--model", str(model), "--output", str(tmp_path / "out"), *SIZE]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out.startswith("2 of 3 videos tracked, 2 of them now, in ")
    assert next(line for line in said.err.splitlines() if "broken" in line).startswith("corrdit track: broken.mp4: ")
    assert "Traceback" not in said.err
    for name, frames in (("a.mp4", 3), ("more/b.gif", 4)):
        assert sorted(path.name for path in (tmp_path / "out" / name).iterdir()) == [
            "tracks.mp4",
            "tracks.npz",
            "tracks.png",
        ]
        tracks = Tracks.load(tmp_path / "out" / name / "tracks.npz")
        assert (tracks.frames, tracks.points) == (frames, 4)
        np.testing.assert_allclose(tracks.xy[0, 0], (16, 12))

    (videos / "broken.mp4").unlink()
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("2 of 2 videos tracked, 0 of them now, in ")
    assert main(["track", str(videos / "a.mp4"), *arguments[2:5], str(tmp_path / "one"), *SIZE]) == 0
    one = Tracks.load(tmp_path / "one" / "tracks.npz")
    np.testing.assert_array_equal(one.xy, Tracks.load(tmp_path / "out" / "a.mp4" / "tracks.npz").xy)


def test_other_settings_and_wrong_devices_are_refused(
    model: Path, videos: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (videos / "broken.mp4").unlink()
    (videos / "more" / "b.gif").unlink()
    arguments = ["track", str(videos), "--model", str(model), "--output", str(tmp_path / "out"), *SIZE]
    assert main(arguments) == 0
    assert "other settings: start 0 (now 1)" in refused(*arguments, "--start", "1")
    assert "accepted is a number of 1 or more" in refused(*arguments, "--processes", "0")
    assert "--device warp is not a device" in refused(*arguments, "--device", "warp")
    assert "unknown model 'cogvid'" in refused(
        "track", videos, "--model", "cogvid", "--output", tmp_path / "other", "--points", "grid:2"
    )


def test_a_folder_of_frames_is_one_video(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    assert not is_folder_of_videos(tmp_path)
    (tmp_path / "frames" / "0.png").write_bytes(b"")
    assert is_folder_of_videos(tmp_path)
    assert not is_folder_of_videos(tmp_path / "frames")
    assert not is_folder_of_videos(tmp_path / "frames" / "0.png")


def test_results_beside_the_videos_are_not_taken_for_videos(
    model: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos / "broken.mp4").unlink()
    arguments = ["track", str(videos), "--model", str(model), "--output", str(videos / "out"), *SIZE]
    for now in (2, 0):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith(f"2 of 2 videos tracked, {now} of them now, in ")


def test_ctrl_c(model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from corrdit.integrations.lightning import TrackingModule

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TrackingModule, "predict_step", interrupted)
    try:
        assert main(["track", str(videos), "--model", str(model), "--output", str(tmp_path / "out"), *SIZE]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list((tmp_path / "out").rglob("tracks.npz"))


@pytest.mark.slow
def test_two_processes(model: Path, videos: Path, tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("corrdit")
    arguments = ["track", str(videos), "--model", str(model), "--output", str(tmp_path / "out"), *SIZE]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [str(command), *arguments, "--processes", "2"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("2 of 3 videos tracked, 2 of them now") == 1
    assert "Traceback" not in done.stderr
