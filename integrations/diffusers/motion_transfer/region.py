"""The part of a video whose motion is wanted, as the model's tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.motion_transfer.reference import at_rate
from corrdit.motion import boxes_on_path
from corrdit.video import read_video
from corrdit.video.info import FRAME_SUFFIXES

Region: TypeAlias = "np.ndarray | Tensor | Sequence[float] | Sequence[Sequence[float]]"
"""A mask `[T, H, W]` or `[H, W]` of any size, True or above half where it is; a box (left, top, right, bottom); or
a box that moves, (time, left, top, right, bottom) each. Boxes are in shares of the frame's sides and of the video's
length."""

PICTURES = (*FRAME_SUFFIXES, ".bmp", ".webp")
COVERED = 0.5
"""A token is in a mask that covers this share of it."""


def region_of_file(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    max_frames: int | None = None,
    stride: int = 1,
    fps: float | None = None,
) -> np.ndarray:
    """A mask from a picture, a video or a folder of frames, white where the region is.

    Args:
        path: of it.
        start, max_frames, stride, fps: which of its frames, as of the reference's.

    Returns:
        float `[H, W]` of a picture or `[T, H, W]`, 0 to 1.

    Raises:
        ValueError: neither.
    """
    file = Path(path)
    if file.suffix.lower() in PICTURES and file.is_file():
        import imageio.v3 as imageio

        try:
            picture = np.atleast_3d(np.asarray(imageio.imread(file)))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"the region {file} is not a picture that can be read: {error}") from error
        return picture[..., :3].mean(-1) / 255
    video = read_video(file, start=start, max_frames=max_frames, min_frames=1)
    frames, times = video.frames[::stride], None if video.times is None else video.times[::stride]
    return at_rate(frames, video.fps / stride, fps, times)[0].mean(-1) / 255


def region_tokens(backbone: Backbone, region: Region, size: tuple[int, int, int]) -> Tensor:
    """A region as bool `[F, h, w]` of the tokens of a video.

    Args:
        backbone: whose tokens they are.
        region: of the video; of a mask with fewer frames they are repeated evenly, of one with more the first count.
        size: frames, height and width of the video.

    Raises:
        ValueError: what is no region, or one that holds no token.
    """
    frames, height, width = size
    groups = backbone.latent_frame_map(frames)
    rows, columns = height // backbone.token_stride[0], width // backbone.token_stride[1]
    if isinstance(region, (np.ndarray, Tensor)):
        found = _of_mask(torch.as_tensor(region), groups, frames, rows, columns)
    else:
        path = region if region and isinstance(region[0], Sequence) else [(0.0, *region)]  # type: ignore[misc]
        times = [index / max(len(groups) - 1, 1) for index in range(len(groups))]
        try:
            found = boxes_on_path(path, times, rows, columns)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                "region must be a mask [T, H, W] or [H, W], a box (left, top, right, bottom) in shares of the frame, "
                f"or such boxes with their times in front: {error}"
            ) from error
    if not bool(found.any()):
        raise ValueError(
            f"the region covers no token of {backbone.token_stride[0]} x {backbone.token_stride[1]} pixels by half; "
            "give a larger one, or a larger video"
        )
    return found


def _of_mask(mask: Tensor, groups: Sequence[Sequence[int]], frames: int, rows: int, columns: int) -> Tensor:
    if mask.ndim not in (2, 3) or 0 in mask.shape or mask.is_complex():
        raise ValueError(f"a mask must be [T, H, W] or [H, W], got {mask.dtype} {list(mask.shape)}")
    values = mask.float() if mask.is_floating_point() or mask.dtype == torch.bool else mask.float() / 255
    if not bool(torch.isfinite(values).all()) or float(values.max()) > 1 or float(values.min()) < 0:
        raise ValueError("a mask must be bool, uint8 (0 or 255) or between 0 and 1")
    values = (values > 0.5).float().reshape(-1, 1, *mask.shape[-2:])
    if len(values) < frames:
        values = values[torch.linspace(0, len(values) - 1, frames).round().long()]
    covered = functional.adaptive_avg_pool2d(values[:frames], (rows, columns))[:, 0]
    by_group = [covered[list(group)].mean(0) if group else covered[-1] for group in groups]
    return torch.stack(by_group) >= COVERED
