"""The video and the query points a tracker is given: checks, and points on a grid."""

from __future__ import annotations

import re

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from corrdit.video.frames import Frames, VideoLike, as_frames, describe

__all__ = ["Frames", "VideoLike", "check_queries", "check_video", "grid_points", "grid_side"]


MOST_GRID = 512
"""Points a side of a grid."""


def check_video(video: VideoLike) -> Frames:
    """At least two frames, as `corrdit.video.as_frames` takes them, as uint8 `[T, H, W, 3]` that is given by slices."""
    return as_frames(video, min_frames=2)


def grid_side(spec: str) -> int | None:
    """N of "grid:N"; None for other words and for sides outside 1 to `MOST_GRID`."""
    match = re.fullmatch("grid:([0-9]{1,9})", spec)
    side = 0 if match is None else int(match[1])
    return side if 1 <= side <= MOST_GRID else None


def grid_points(count: int, height: int, width: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """`count` x `count` points at the centres of equal cells of frame 0: `[count**2, 3]`, (frame, x, y), row by row."""
    share = (np.arange(count) + 0.5) / count
    y, x = np.meshgrid(share * height, share * width, indexing="ij")
    return np.stack((np.zeros_like(x), x, y), axis=-1).reshape(-1, 3).astype(dtype)


def check_queries(queries: object, frames: int, height: int, width: int) -> Tensor:
    """float32 `[P, 3]` (frame, x, y) in pixels of the video, inside it; "grid:N" is N x N points on frame 0."""
    if isinstance(queries, str):
        side = grid_side(queries)
        if side is None:
            raise ValueError(
                "queries must be numbers [points, 3] as (frame, x, y), or grid:N for N x N points on the first frame,"
                f" N from 1 to {MOST_GRID}, got {queries!r}"
            )
        queries = grid_points(side, height, width)
    if isinstance(queries, (int, float)):
        raise ValueError(
            f"queries must be points [points, 3] as (frame, x, y), got {queries!r}; N x N points on the first frame are"
            ' "grid:N"'
        )
    try:
        table = torch.as_tensor(queries).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"queries must be numbers [points, 3] as (frame, x, y), got {describe(queries)}") from error
    if table.ndim != 2 or table.shape[1] != 3:
        raise ValueError(f"queries must have shape [points, 3] as (frame, x, y) in pixels, got {list(table.shape)}")
    if table.shape[0] == 0:
        raise ValueError("queries has no point; give at least one (frame, x, y)")
    finite = torch.isfinite(table).all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"queries row {row} is {table[row].tolist()}; frame, x and y must be finite numbers")
    frame, x, y = table.unbind(1)
    for name, wrong, accepted in (
        ("frame", (frame != frame.round()) | (frame < 0) | (frame >= frames), f"a whole number from 0 to {frames - 1}"),
        ("x", (x < 0) | (x > width), f"from 0 to {width}"),
        ("y", (y < 0) | (y > height), f"from 0 to {height}"),
    ):
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"queries row {row} is (frame, x, y) = {tuple(round(value, 3) for value in table[row].tolist())}: "
                f"{name} must be {accepted} for this video of {frames} frames of {width} x {height} pixels"
            )
    return table
