"""The commands, as processes of their own, on tiny models with text encoders from a folder."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from corrdit.testing import TINY_MODELS
from corrdit.video import write_video

FAMILIES = ("cogvideox-rotary", "ltx", "mochi", "allegro")
"""Whose text encoder is T5 alone, and whose pipelines need no package that cleans prompts."""

pytestmark = pytest.mark.slow


def corrdit(*arguments: object) -> None:
    command = [sys.executable, "-m", "corrdit", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", FAMILIES)
def test_the_four_uses_from_the_command_line(name: str, tmp_path: Path, with_words: Callable[[str], Path]) -> None:
    model, side, frames = with_words(name), TINY_MODELS[name].height, TINY_MODELS[name].frames
    picture = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    video = [np.roll(picture.repeat(8, 0).repeat(8, 1), 5 * frame, axis=1) for frame in range(frames)]
    clip = tmp_path / "videos" / "clip.mp4"
    clip.parent.mkdir()
    write_video(str(clip), video, 8)
    start = np.array([[20.0, 20.0], [40.0, 30.0]], np.float32)
    np.savez(clip.with_suffix(".npz"), xy=np.repeat(start[None], frames, 0), visible=np.ones((frames, 2), bool))
    size = ["--height", side, "--width", side]
    corrdit("track", clip, "--model", model, "--points", "grid:2", *size, "--output", tmp_path / "track")
    assert (tmp_path / "track" / "tracks.npz").is_file()
    corrdit(
        "analyze",
        "--videos",
        clip.parent,
        "--model",
        model,
        "--layers",
        "1",
        "--steps",
        "30",
        "--output",
        tmp_path / "analysis",
    )
    assert (tmp_path / "analysis" / "analysis.csv").is_file()
    words, run = "a red disc moves left", ["--steps", "2", "--model", model]
    made = ["--cag", "--cag-layers", "1", "--frames", frames, *size]
    corrdit("generate", words, *run, *made, "--output", tmp_path / "generated")
    assert (tmp_path / "generated" / "video.mp4").is_file()
    transferred = ["--optimisation-steps", "2", "--blocks", "[1]", "--output", tmp_path / "transferred"]
    corrdit("transfer", clip, words, *run, *transferred)
    assert (tmp_path / "transferred" / "result.mp4").is_file()
