"""Tracking video files: finding them, frames read at a reduced size, results in the file's own pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from corrdit.progress import Progress
from corrdit.tracking.queries import Frames, check_queries
from corrdit.tracking.tracks import Tracks
from corrdit.video.folders import check_not_mixed
from corrdit.video.info import FRAME_SUFFIXES, VIDEO_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from corrdit.video import StreamedVideo
    from corrdit.visualization import TrackStyle

RESULT_FILE = "tracks.npz"
PARTS = ".parts"
"""Folder, within that of the results, for the finished blocks of a video that is being tracked."""


class Tracker(Protocol):
    """A `corrdit.PointTracker`, or what tracks as it does."""

    def track(
        self,
        video: Frames,
        queries: np.ndarray,
        *,
        progress: Progress | None = ...,
        resume: str | os.PathLike[str] | None = ...,
    ) -> Tracks: ...


def find_videos(folder: str | os.PathLike[str], *, without: str | os.PathLike[str] | None = None) -> list[str]:
    """Names, relative to the folder and sorted, of the videos in it: video files, and folders that hold frames.

    Hidden files and folders are passed over.

    Args:
        folder: looked through with its subfolders.
        without: a folder to pass over, such as one for results.

    Raises:
        ValueError: not a folder, one without videos, or videos and pictures in one folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of video files or of folders of frames")
    found = videos_below(root, without=without)
    if not found:
        raise ValueError(
            f"{folder} holds no videos; accepted are {', '.join(VIDEO_SUFFIXES)} files and folders of png or jpg frames"
        )
    return found


def videos_below(root: Path, *, without: str | os.PathLike[str] | None = None) -> list[str]:
    """As `find_videos`, without a complaint where there are none."""
    skipped = None if without is None else Path(without).resolve()
    found = []
    for place, folders, files in os.walk(root):
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).resolve() != skipped]
        shown = [name for name in files if not name.startswith(".")]
        check_not_mixed(here, shown)
        found += [here / name for name in shown if name.lower().endswith(VIDEO_SUFFIXES)]
        if here != root and any(name.lower().endswith(FRAME_SUFFIXES) for name in shown):
            found.append(here)
    return sorted(path.relative_to(root).as_posix() for path in found)


def track_at_size(
    tracker: Tracker,
    video: Frames,
    queries: object,
    size: tuple[int, int],
    *,
    progress: Progress | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Tracks:
    """Track points given in pixels of one size through frames that were shrunk to another while they were read.

    Args:
        tracker: a `corrdit.PointTracker`.
        video: what it tracks through, `[T, H, W, 3]`.
        queries: `[P, 3]` (frame, x, y), x and y in pixels of frames of `size`; or "grid:16".
        size: (height, width) in pixels.
        progress: called with (forward passes done, forward passes in all).
        resume: a folder in which a run that was stopped goes on, see `PointTracker.track`.

    Returns:
        Tracks in pixels of frames of `size`; every point is exactly at its query's place in its query's frame.

    Raises:
        ValueError: as `PointTracker.track`.
    """
    given = check_queries(queries, len(video), *size).numpy()
    if tuple(video.shape[1:3]) == tuple(size):
        return tracker.track(video, given, progress=progress, resume=resume)
    extent = np.array([video.shape[2], video.shape[1]], dtype=np.float32)
    factor = extent / np.array(size[::-1], dtype=np.float32)
    shrunk = given.copy()
    # The product is rounded, and points on the border stay inside.
    shrunk[:, 1:] = np.minimum(given[:, 1:] * factor, np.array(size[::-1], dtype=np.float32) * factor)
    tracks = tracker.track(video, shrunk, progress=progress, resume=resume)
    xy = tracks.xy / torch.from_numpy(factor)
    xy[given[:, 0].astype(int), np.arange(len(given))] = torch.from_numpy(given[:, 1:])
    return Tracks(xy=xy, visible=tracks.visible, score=tracks.score)


def write_track_results(
    folder: str | os.PathLike[str],
    video: StreamedVideo,
    tracks: Tracks,
    queries: np.ndarray,
    *,
    pictures: bool = True,
    columns: Mapping[str, ArrayLike] | None = None,
    style: TrackStyle | None = None,
    progress: Progress | None = None,
) -> None:
    """Write `tracks.npz` and, with `pictures`, `tracks.mp4` and `tracks.png` into a folder.

    Args:
        folder: an existing folder.
        video: the frames the tracks were made from; pictures are drawn over the file's own frames.
        tracks: in pixels of the file.
        queries: float `[P, 3]` (frame, x, y) in pixels of the file.
        pictures: whether to draw.
        columns: further facts of the points, such as labels, `[P]` each, by name; stored along.
        style: how they are drawn.
        progress: called with (frames drawn, frames in all).
    """
    from corrdit.visualization import write_track_pictures

    folder = Path(folder)
    if pictures:
        write_track_pictures(
            video.at_size(video.info.height, video.info.width),
            tracks,
            (video.info.height, video.info.width),
            queries=queries,
            fps=video.info.fps,
            video_path=folder / "tracks.mp4",
            sheet_path=folder / "tracks.png",
            style=style,
            progress=progress,
        )
    tracks.save(folder / RESULT_FILE, queries=queries, columns=columns, hdr=video.info.hdr)
