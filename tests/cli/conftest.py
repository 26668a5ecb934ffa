"""A stand-in for the model, so that the command line is tested without one, and a small clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import corrdit.tracking
from corrdit.cli import main
from corrdit.integrations.diffusers.backbones import loading
from corrdit.tracking import Tracks
from corrdit.video import write_video

HEIGHT, WIDTH, FRAMES = 48, 64, 6
SHIFT = 2.0


class DriftingTracker:
    """Says that every point drifts to the right by two pixels a frame, and is hidden from the fourth frame on."""

    asked: dict[str, Any]

    def __init__(self, backbone: Any, **options: Any) -> None:
        type(self).asked = {"model": backbone.name, "preset": backbone.preset, **options}

    def track(
        self,
        video: Any,
        queries: np.ndarray,
        progress: Callable[[int, int], None] | None = None,
        resume: Path | None = None,
    ) -> Tracks:
        frames = video.shape[0]
        type(self).asked |= {"shape": tuple(video.shape), "first": video[0:1].mean(), "queries": np.array(queries)}
        steps = np.arange(frames)[:, None] - queries[None, :, 0]
        xy = np.repeat(queries[None, :, 1:], frames, axis=0)
        xy[..., 0] += SHIFT * steps
        if progress is not None:
            progress(0, 1)
            progress(1, 1)
        return Tracks(xy=xy.astype(np.float32), visible=steps < 4, score=np.ones(steps.shape, np.float32))


@pytest.fixture
def drifting_tracker(monkeypatch: pytest.MonkeyPatch) -> type[DriftingTracker]:
    """Put the stand-in where the command looks for the tracker and its model."""
    monkeypatch.setitem(vars(corrdit.tracking), "PointTracker", DriftingTracker)
    weights = {"fingerprint": lambda: "random"}
    monkeypatch.setattr(
        loading, "load_backbone", lambda name, **options: SimpleNamespace(name=name, **weights, **options)
    )
    return DriftingTracker


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mp4: 6 frames of 48 x 64 at 10 frames per second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    write_video(path, frames.repeat(8, axis=1).repeat(8, axis=2), fps=10)
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process, expect status 2 and one line on the error stream; gives that line."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert status == 2, (status, err)
        assert out == ""
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(f"corrdit {arguments[0]}: ")
        assert "Traceback" not in lines[0]
        return lines[0]

    return run
