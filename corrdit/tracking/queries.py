"""The video and the query points a tracker is given: checks, and points on a grid."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor


class Frames(Protocol):
    """A video uint8 `[T, H, W, 3]`: a tensor, an array, or an object with such a shape that gives frames by slices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, part: slice, /) -> object: ...

    def __len__(self) -> int: ...


Video = TypeVar("Video", bound=Frames)


def check_video(video: Video) -> Video:
    """uint8 `[T, H, W, 3]` with at least two frames, as a tensor or as an object that gives frames by slices."""
    shape = tuple(getattr(video, "shape", ()))
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"video must be uint8 [frames, height, width, 3], got {_describe(video)}")
    if "uint8" not in str(getattr(video, "dtype", "")):
        raise ValueError(
            f"video must be uint8 with values 0 to 255, got {_describe(video)}; scale and convert it first"
        )
    if shape[0] < 2:
        raise ValueError("video has one frame; tracking needs at least two")
    return video


def grid_points(count: int, height: int, width: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """`count` x `count` points at the centres of equal cells of frame 0: `[count**2, 3]`, (frame, x, y), row by row."""
    share = (np.arange(count) + 0.5) / count
    y, x = np.meshgrid(share * height, share * width, indexing="ij")
    return np.stack((np.zeros_like(x), x, y), axis=-1).reshape(-1, 3).astype(dtype)


def check_queries(queries: object, frames: int, height: int, width: int) -> Tensor:
    """float32 `[P, 3]` (frame, x, y) in pixels of the video, inside it."""
    try:
        table = torch.as_tensor(queries).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"queries must be numbers [points, 3] as (frame, x, y), got {_describe(queries)}") from error
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


def _describe(value: object) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return kind if shape is None else f"{kind} {list(shape)} {getattr(value, 'dtype', '')}".rstrip()
