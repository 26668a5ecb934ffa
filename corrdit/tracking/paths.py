"""From the cost maps of all frames to one path for each point: matches near the path so far are preferred."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.tracking.peaks import refined_peaks

FAR_SHARE = 0.02
"""Preference of a place far from the path, relative to one on it: a match fifty times better elsewhere is a jump."""


def preferred_peaks(cost: Tensor, expected: Tensor, *, spread: float, refine: int) -> tuple[Tensor, Tensor]:
    """The best place of each cost map, where places near an expected one count more.

    The cost is multiplied by `FAR_SHARE + (1 - FAR_SHARE) exp(-d^2 / (2 spread^2))` at distance d from the expected
    place before the maximum is taken; the refinement and the score are those of the plain cost.

    Args:
        cost: float `[P, h, w]`, not negative.
        expected: `[P, 2]` (x, y) in tokens.
        spread: standard deviation in tokens.
        refine: radius of the cost-weighted mean, see `refined_peaks`.

    Returns:
        xy `[P, 2]` (x, y) in tokens, and score `[P]`, the plain cost at the best token.
    """
    _, height, width = cost.shape
    column = torch.arange(width, dtype=cost.dtype) - expected[:, :1]
    row = torch.arange(height, dtype=cost.dtype) - expected[:, 1:]
    distance = row.square().unsqueeze(2) + column.square().unsqueeze(1)
    preference = FAR_SHARE + (1 - FAR_SHARE) * torch.exp(distance / (-2 * spread**2))
    best = (cost * preference).flatten(1).argmax(1)
    return refined_peaks(cost, refine, best=best)
