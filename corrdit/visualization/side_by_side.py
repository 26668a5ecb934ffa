"""Videos side by side in one file, each with its name above it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from corrdit.video import VideoWriter, resize_frame
from corrdit.video.info import DEFAULT_FPS
from corrdit.visualization.sheet import enlargement, laid_out, write_labels

_LEAST_HEIGHT = 240
"""Pixels of a panel; smaller videos are enlarged."""


def write_side_by_side(
    path: str | os.PathLike[str],
    panels: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    fps: float = DEFAULT_FPS,
    *,
    caption: str = "",
) -> None:
    """Write videos beside each other as one.

    Args:
        path: as `corrdit.video.VideoWriter` takes it.
        panels: frames uint8 `[T, H, W, 3]` by label; a panel with fewer frames than the longest stays at its last.
        fps: frames a second.
        caption: a line below.

    Raises:
        ValueError: no panels, or one without frames.
    """
    if not panels or not all(len(frames) for frames in panels.values()):
        raise ValueError(f"panels needs videos with frames, got {', '.join(panels) or 'none'}")
    height, width = next(iter(panels.values()))[0].shape[:2]
    factor = enlargement(height, _LEAST_HEIGHT, max(height, width))
    cell = (height * factor, width * factor)
    blank = [np.full((*cell, 3), 255, np.uint8)] * len(panels)
    sheet, corners = laid_out(blank, len(panels), cell, bool(caption))
    sheet = write_labels(sheet, corners, list(panels), caption)
    with VideoWriter(path, fps) as writer:
        for index in range(max(map(len, panels.values()))):
            frame = sheet.copy()
            for (top, left), frames in zip(corners, panels.values(), strict=True):
                picture = resize_frame(frames[min(index, len(frames) - 1)], *cell)
                frame[top : top + cell[0], left : left + cell[1]] = picture
            writer.write(frame)
