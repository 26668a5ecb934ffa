"""Sizes at which frames are encoded, and frames kept while they are needed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from corrdit.tracking.queries import Frames

PREPARED_TOGETHER = 16


class FrameStore:
    """Something made of every frame of a video (its latent, its picture at another size), for the frames last asked.

    Frames are read in the order of the video, runs of neighbours at once, so that a streamed video is not sought
    through.

    Args:
        video: gives uint8 `[t, H, W, 3]` by slices.
        make: from such frames and their numbers to a tensor `[t, ...]`.
        most: frames that are kept.
    """

    def __init__(self, video: Frames, make: Callable[[Tensor, list[int]], Tensor], most: int) -> None:
        self._video = video
        self._make = make
        self._most = most
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def load(self, frames: Iterable[int]) -> None:
        """Make what is missing of these frames and let older ones go."""
        asked = sorted(set(frames))
        for frame in asked:
            if frame in self._kept:
                self._kept.move_to_end(frame)
        missing = [frame for frame in asked if frame not in self._kept]
        for run in _runs(missing):
            made = self._make(torch.as_tensor(self._video[run[0] : run[-1] + 1]), run)
            self._kept.update(zip(run, made.clone().unbind(), strict=True))
        while len(self._kept) > max(self._most, len(asked)):
            self._kept.popitem(last=False)

    def keep(self, made: Tensor) -> None:
        """Take what was made of every frame of the video, as `of` gave it."""
        self._kept.update(enumerate(made.unbind()))

    def of(self, frames: Iterable[int]) -> Tensor:
        """`[t, ...]` of frames in the order given."""
        asked = list(frames)
        self.load(asked)
        return torch.stack([self._kept[frame] for frame in asked])


def _runs(frames: list[int]) -> list[list[int]]:
    """Neighbouring frames together, at most `PREPARED_TOGETHER`."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and frame == runs[-1][-1] + 1 and len(runs[-1]) < PREPARED_TOGETHER:
            runs[-1].append(frame)
        else:
            runs.append([frame])
    return runs


def working_size(height: int, width: int, stride: tuple[int, int], tokens_per_frame: int) -> tuple[int, int]:
    """(height, width) in whole tokens of `stride` pixels, near the video's shape and at most `tokens_per_frame`.

    Frames are never enlarged beyond the next whole token.
    """
    shrink = min(1.0, math.sqrt(tokens_per_frame * stride[0] * stride[1] / (height * width)))
    rows, columns = (max(1, round(size * shrink / step)) for size, step in zip((height, width), stride, strict=True))
    while rows * columns > tokens_per_frame and max(rows, columns) > 1:
        rows, columns = (rows - 1, columns) if rows * width > columns * height else (rows, columns - 1)
    return rows * stride[0], columns * stride[1]


def resized(video: Tensor, height: int, width: int, *, antialias: bool = True) -> Tensor:
    """uint8 `[T, H, W, 3]` at another size, bilinear."""
    if tuple(video.shape[1:3]) == (height, width):
        return video
    frames = torch.nn.functional.interpolate(
        video.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear", antialias=antialias, align_corners=False
    )
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
