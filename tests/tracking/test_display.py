"""What a notebook shows of the public objects, and the bar of long work."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from pixel_backbone import PixelBackbone

from corrdit import PointTracker, progress
from corrdit.display import animation_html, outline
from corrdit.progress import hidden_bars, progress_or_bar
from corrdit.video import read_video, write_video


def test_a_video_is_a_short_name_and_a_small_animation(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (30, 9, 12, 3), dtype=np.uint8)
    write_video(tmp_path / "clip.mp4", frames.repeat(40, 1).repeat(40, 2), 10)
    video = read_video(tmp_path / "clip.mp4")
    assert repr(video) == "Video(30 frames of 360 x 480, 10 a second, clip.mp4)"
    found = re.search(r'src="data:image/gif;base64,([^"]+)"', video._repr_html_())
    shown = Image.open(io.BytesIO(base64.b64decode(found[1])))
    assert (shown.size, shown.n_frames) == ((240, 180), 8)
    assert len(video._repr_html_()) < 200_000


def test_names_are_escaped():
    page = animation_html(np.zeros((1, 4, 4, 3), np.uint8), 8, '<b>"x"')
    assert "<b>" not in page


def test_results_in_a_few_words():
    found = {"flow": torch.zeros(1, 2), "both": (np.zeros(3, bool), "text")}
    assert outline(found) == "flow: float32 [1, 2]; both: bool [3], str"


def test_what_is_shown_brings_in_no_plotting():
    code = (
        "import sys, numpy as np; from corrdit import Tracks;"
        "tracks = Tracks(np.zeros((2, 1, 2)), np.ones((2, 1), bool), np.ones((2, 1)));"
        "repr(tracks), tracks._repr_html_();"
        "print([name for name in ('matplotlib', 'av', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Bar:
    """Stands in for tqdm."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **options: object) -> None:
        self.n, self.total, self.closed = 0, None, False
        self.made.append(self)

    def update(self, more: int) -> None:
        self.n += more

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    """Bars made as if in a notebook."""
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Bar))
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    return Bar.made


def test_long_work_has_a_bar_that_ends(bars):
    report = progress_or_bar(None, "forward passes")
    for done in range(4):
        report(done, 3)
    assert [(bar.n, bar.total, bar.closed) for bar in bars] == [(3, 3, True)]


def test_no_bar_beside_one_that_was_given_or_inside_a_command(bars):
    given = []
    progress_or_bar(lambda done, total: given.append((done, total)), "passes")(1, 2)
    with hidden_bars():
        progress_or_bar(None, "passes")(1, 2)
    assert (given, bars) == ([(1, 2)], [])


def test_no_bar_in_a_log(monkeypatch, bars):
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    progress_or_bar(None, "passes")(1, 2)
    assert bars == []


def test_a_tracker_shows_its_passes(bars):
    video = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    tracker = PointTracker(PixelBackbone())
    tracker.track(video, [(0, 4.0, 4.0)])
    assert [bar.closed and bar.n == bar.total > 0 for bar in bars] == [True]
    assert repr(tracker).startswith("<PointTracker of ")
    assert "reads" in tracker._repr_html_()
