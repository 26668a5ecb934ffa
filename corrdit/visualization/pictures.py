"""The video and the contact sheet of a tracking result, in one pass over the frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np

from corrdit.video import VideoWriter
from corrdit.visualization.sheet import cell_size, contact_sheet, sheet_frames
from corrdit.visualization.tracks import DrawableTracks, TrackPainter, TrackStyle


def write_track_pictures(
    frames: Iterable[np.ndarray],
    tracks: DrawableTracks,
    size: tuple[int, int],
    *,
    queries: np.ndarray,
    fps: float,
    video_path: str | os.PathLike[str],
    sheet_path: str | os.PathLike[str],
    style: TrackStyle | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw tracks over a video and write it with its contact sheet, holding one frame at a time.

    Args:
        frames: uint8 `[H, W, 3]`, one after another.
        tracks: xy `[T, P, 2]` in pixels, visible `[T, P]`.
        size: (height, width) of the video in whose pixels `tracks` is given.
        queries: float `[P, 3]`, (frame, x, y); their places give the colours.
        fps: frames per second of the written video.
        video_path: .mp4, .mov or .gif; sheet_path: .png.
        style: see `TrackStyle`.
        progress: called with (frames done, frames in all).
    """
    total = len(tracks.xy)
    chosen = sheet_frames(total)
    starts = np.asarray(queries)[:, 1:]
    painter = TrackPainter(tracks, *size, starts=starts, style=style)
    cell_painter = TrackPainter(tracks, *size, starts=starts, style=style, size=cell_size(len(chosen), *size))
    cells = []
    with VideoWriter(video_path, fps) as writer:
        for index, frame in enumerate(frames):
            writer.write(painter.draw(frame, index))
            if index in chosen:
                cells.append(cell_painter.draw(frame, index))
            if progress is not None:
                progress(index + 1, total)
        visible = 100 * float(np.asarray(tracks.visible).mean())
        contact_sheet(
            cells,
            [f"frame {index}" for index in chosen],
            path=sheet_path,
            caption=f"{tracks.xy.shape[1]} points, {visible:.0f} % visible. Filled dots are visible, rings are hidden;"
            " colours tell where a point starts.",
        )
