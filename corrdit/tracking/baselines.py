"""What a tracker has to beat: points that stand still, and the patch of pixels that looks most alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit.tracking.queries import Frames, VideoLike, check_queries, check_video
from corrdit.tracking.tracks import Tracks


def standing_still(queries: object, frames: int) -> Tracks:
    """Every point stays where it was given, visible, with score 1.

    Args:
        queries: `[P, 3]` (frame, x, y) in pixels.
        frames: T, the number of video frames.

    Raises:
        ValueError: queries of another shape, not finite, or on frames outside 0 to `frames` - 1.
    """
    table = check_queries(queries, frames, height=2**31, width=2**31)
    xy = table[None, :, 1:].repeat(frames, 1, 1)
    return Tracks(xy=xy, visible=torch.ones(xy.shape[:2], dtype=torch.bool), score=torch.ones(xy.shape[:2]))


def nearest_patches(video: VideoLike, queries: object, *, radius: int = 3) -> Tracks:
    """Every point goes to the pixel of each frame whose surroundings differ least from those of the query.

    The surroundings are the (2 radius + 1)^2 pixels around the query's pixel, compared with those around every pixel
    of the frame (all positions, no motion prior) by the sum of squared differences of RGB; the border is continued by
    its outermost pixels. A point keeps its place within its pixel.

    Args:
        video: as `PointTracker.track` takes it.
        queries: `[P, 3]` (frame, x, y) in pixels.
        radius: of the patch, in pixels.

    Returns:
        `Tracks`; every point is called visible; the score is 1 / (1 + difference / contrast), the mean squared
        difference at the match over the variance of the query's patch.

    Raises:
        ValueError: as `PointTracker.track`, or a negative radius.
    """
    if radius < 0:
        raise ValueError(f"radius={radius} was given; accepted is a number of pixels of 0 or more")
    clip = check_video(video)
    frames, height, width = (int(size) for size in clip.shape[:3])
    table = check_queries(queries, frames, height, width)
    anchor = table[:, 0].long()
    column = table[:, 1].floor().long().clamp(max=width - 1)
    row = table[:, 2].floor().long().clamp(max=height - 1)
    offset = table[:, 1:] - torch.stack((column, row), -1)
    patches = torch.stack(
        [
            _padded(clip, frame, radius)[0, :, y : y + 2 * radius + 1, x : x + 2 * radius + 1]
            for frame, y, x in zip(anchor.tolist(), row.tolist(), column.tolist(), strict=True)
        ]
    )
    contrast = patches.flatten(1).var(1).clamp(min=1e-4)
    xy = torch.empty(frames, len(table), 2)
    score = torch.empty(frames, len(table))
    for frame in range(frames):
        difference = _differences(_padded(clip, frame, radius), patches).flatten(1)
        least, best = difference.min(1)
        xy[frame] = torch.stack((best % width, best // width), -1) + offset
        score[frame] = 1 / (1 + least.clamp(min=0) / patches[0].numel() / contrast)
    points = torch.arange(len(table))
    xy[anchor, points], score[anchor, points] = table[:, 1:], 1.0
    return Tracks(xy=xy, visible=torch.ones(frames, len(table), dtype=torch.bool), score=score)


def _padded(video: Frames, frame: int, radius: int) -> Tensor:
    """Frame as float `[1, 3, H + 2 radius, W + 2 radius]` round zero."""
    pixels = torch.as_tensor(video[frame : frame + 1]).permute(0, 3, 1, 2).float() / 255 - 0.5
    return F.pad(pixels, (radius,) * 4, mode="replicate")


def _differences(frame: Tensor, patches: Tensor) -> Tensor:
    """Sums of squared differences `[P, H, W]` of patches `[P, 3, k, k]` to a padded frame, as a^2 - 2ab + b^2."""
    energy = F.conv2d(frame.square().sum(1, keepdim=True), patches.new_ones(1, 1, *patches.shape[2:]))
    return (energy - 2 * F.conv2d(frame, patches))[0] + patches.square().sum((1, 2, 3))[:, None, None]
