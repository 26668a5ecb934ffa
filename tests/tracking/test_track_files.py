"""Tracking through frames read at another size, and finding videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import Tracks
from corrdit.tracking.files import find_videos, track_at_size
from corrdit.tracking.queries import grid_points


class Drifting:
    """Moves every point by (1, 2) pixels of the frames it sees in each frame."""

    def track(self, video, queries, *, progress=None, resume=None):
        self.queries = np.array(queries)
        steps = np.arange(len(video))[:, None, None] - self.queries[None, :, :1]
        xy = self.queries[None, :, 1:] + steps * np.array([1.0, 2.0])
        return Tracks(xy, np.ones(xy.shape[:2], bool), np.ones(xy.shape[:2]))


def test_tracks_come_back_in_the_pixels_of_the_queries():
    video = torch.zeros(4, 30, 40, 3, dtype=torch.uint8)
    queries = np.array([[0, 10.0, 20.0], [2, 119.7, 90.0]], np.float32)
    tracker = Drifting()
    tracks = track_at_size(tracker, video, queries, (90, 120))
    np.testing.assert_allclose(tracker.queries[0], [0, 10 / 3, 20 / 3], rtol=1e-6)
    np.testing.assert_allclose(tracks.xy[3, 0], [10 + 3 * 3, 20 + 3 * 6], rtol=1e-5)
    np.testing.assert_allclose(tracks.xy[0, 1], [119.7 - 2 * 3, 90 - 2 * 6], rtol=1e-5)
    np.testing.assert_array_equal(tracks.xy[0, 0], queries[0, 1:])
    np.testing.assert_array_equal(tracks.xy[2, 1], queries[1, 1:])


def test_a_point_on_the_border_stays_inside_and_one_outside_is_refused_in_pixels_of_the_file():
    tracker = Drifting()
    size = (101, 333)
    video = torch.zeros(2, 30, 99, 3, dtype=torch.uint8)
    track_at_size(tracker, video, np.array([[0, 333, 101], [0, 0, 50]], np.float32), size)
    assert tracker.queries[0, 1] <= 99
    assert tracker.queries[0, 2] <= 30
    with pytest.raises(ValueError, match=r"\(0.0, 340.0, 50.0\): x must be from 0 to 333"):
        track_at_size(tracker, video, np.array([[0, 340, 50]], np.float32), size)


@pytest.mark.parametrize("size", [(101, 333), (30, 99)])
def test_a_grid_by_its_name(size):
    tracks = track_at_size(Drifting(), torch.zeros(2, 30, 99, 3, dtype=torch.uint8), "grid:4", size)
    np.testing.assert_array_equal(tracks.xy[0], grid_points(4, *size)[:, 1:])


def test_frames_of_the_same_size_are_tracked_as_they_are():
    tracker = Drifting()
    queries = np.array([[1, 3.3, 4.4]], np.float32)
    tracks = track_at_size(tracker, torch.zeros(2, 30, 40, 3, dtype=torch.uint8), queries, (30, 40))
    np.testing.assert_array_equal(tracker.queries, queries)
    np.testing.assert_allclose(tracks.xy[0, 0], [2.3, 2.4], rtol=1e-6)


def test_results_inside_the_folder_are_passed_over(tmp_path):
    (tmp_path / "out" / "a.mp4").mkdir(parents=True)
    (tmp_path / "out" / "a.mp4" / "tracks.mp4").write_bytes(b"")
    (tmp_path / "a.mp4").write_bytes(b"")
    assert find_videos(tmp_path) == ["a.mp4", "out/a.mp4/tracks.mp4"]
    assert find_videos(tmp_path, without=tmp_path / "out") == ["a.mp4"]
    with pytest.raises(ValueError, match="holds no videos"):
        find_videos(tmp_path / "out", without=tmp_path / "out" / "a.mp4")


def test_videos_and_pictures_in_one_folder_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("tracks.mp4", "tracks.png"):
        (tmp_path / "a" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"a holds videos \(tracks\.mp4\) and pictures \(tracks\.png\)"):
        find_videos(tmp_path)
    with pytest.raises(ValueError, match="holds videos"):
        find_videos(tmp_path / "a")
    (tmp_path / "b.mp4").write_bytes(b"")
    assert find_videos(tmp_path, without=tmp_path / "a") == ["b.mp4"]
