"""Tracking a video file: frames read at a reduced size, results in the file's own pixels and beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corrdit.tracking.tracks import Tracks

if TYPE_CHECKING:
    from corrdit.video import StreamedVideo

RESULT_FILE = "tracks.npz"
Progress = Callable[[int, int], None]


def track_streamed(tracker: Any, video: StreamedVideo, queries: Any, *, progress: Progress | None = None) -> Tracks:
    """Track points given in a file's own pixels through frames that are read at another size.

    Args:
        tracker: a `corrdit.PointTracker`.
        video: frames on demand; `video.info` knows the file's own size.
        queries: `[P, 3]` (frame, x, y), frame as counted in `video`, x and y in pixels of the file.
        progress: called with (forward passes done, forward passes in all).

    Returns:
        Tracks in pixels of the file.
    """
    factor = torch.tensor([video.shape[2] / video.info.width, video.shape[1] / video.info.height])
    scaled = torch.as_tensor(queries, dtype=torch.float32).clone()
    scaled[:, 1:] *= factor
    tracks = tracker.track(video, scaled, progress=progress)
    if bool((factor == 1).all()):
        return tracks
    return Tracks(xy=tracks.xy / factor, visible=tracks.visible, score=tracks.score)


def write_track_results(
    folder: str | os.PathLike[str],
    video: StreamedVideo,
    tracks: Tracks,
    queries: np.ndarray,
    *,
    start: int = 0,
    pictures: bool = True,
    trail: int = 16,
    progress: Progress | None = None,
) -> None:
    """Write `tracks.npz` and, with `pictures`, `tracks.mp4` and `tracks.png` into a folder.

    Args:
        folder: an existing folder.
        video: the frames the tracks were made from; pictures are drawn over the file's own frames.
        tracks: in pixels of the file.
        queries: float `[P, 3]` (frame, x, y) in pixels of the file.
        start: frames of the file that `video` skips.
        pictures: whether to draw.
        trail: frames of path drawn behind a point.
        progress: called with (frames drawn, frames in all).
    """
    from corrdit.video import iterate_frames
    from corrdit.visualization import TrackStyle, write_track_pictures

    folder = Path(folder)
    if pictures:
        write_track_pictures(
            iterate_frames(video.info.path, start=start, max_frames=len(video)),
            tracks,
            (video.info.height, video.info.width),
            queries=queries,
            fps=video.info.fps,
            video_path=folder / "tracks.mp4",
            sheet_path=folder / "tracks.png",
            style=TrackStyle(trail=trail),
            progress=progress,
        )
    tracks.save(folder / RESULT_FILE, queries=queries)
