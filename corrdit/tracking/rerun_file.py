"""Tracks as a recording for the rerun viewer (https://rerun.io)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import numpy as np

from corrdit.files import written_beside
from corrdit.progress import Progress
from corrdit.tracking.tracks import Tracks
from corrdit.visualization.colours import position_colours

RERUN_FILE = "tracks.rrd"
_JPEG_QUALITY = 85
_HIDDEN_OPACITY = 0.25


def require_rerun() -> None:
    """Raises ImportError, with what to do, where no recording can be written."""
    if find_spec("rerun") is None:
        raise ImportError('a recording needs rerun-sdk, which is not installed; pip install ".[rerun]" in a checkout')


def write_rerun(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    tracks: Tracks,
    *,
    queries: np.ndarray,
    labels: np.ndarray | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the video with its points, frame by frame on the timeline "frame", beside and then renamed.

    Below "video" lie "video/visible" and "video/hidden": points in pixels, coloured by where they start, with the
    number (`point`) and the score of each.

    Args:
        path: ending in .rrd.
        frames: uint8 `[H, W, 3]`, one after another, of the size whose pixels the tracks are given in.
        tracks: of it.
        queries: `[P, 3]` (frame, x, y); their places give the colours, as in `tracks.mp4`.
        labels: text `[P]` shown beside the points.
        progress: called with (frames done, frames in all).

    Raises:
        ImportError: rerun-sdk is not installed.
        ValueError: another number of frames than the tracks have.
    """
    require_rerun()
    import rerun

    numbers, starts = np.arange(tracks.points), np.asarray(queries)[:, 1:]
    with written_beside(path) as file:
        recording = rerun.RecordingStream("corrdit track")
        recording.save(file.name)
        for index, frame in zip(range(tracks.frames), frames, strict=True):
            recording.set_time("frame", sequence=index)
            recording.log("video", rerun.Image(frame).compress(jpeg_quality=_JPEG_QUALITY))
            colours = position_colours(starts, *frame.shape[:2])
            seen = tracks.visible[index].numpy()
            for name, chosen, opacity in (("visible", seen, 1.0), ("hidden", ~seen, _HIDDEN_OPACITY)):
                points = rerun.Points2D(
                    tracks.xy[index].numpy()[chosen],
                    colors=np.column_stack((colours, np.full(len(colours), opacity)))[chosen],
                    labels=None if labels is None else [str(label) for label in labels[chosen]],
                )
                # Not the viewer's own ids of key points, which go up to 65535.
                facts = rerun.AnyValues(point=numbers[chosen], score=tracks.score[index].numpy()[chosen])
                recording.log(f"video/{name}", points, facts)
            if progress is not None:
                progress(index + 1, tracks.frames)
        recording.disconnect()
