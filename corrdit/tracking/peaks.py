"""From cost maps to positions: the best token, refined below the token, and whether the match back agrees.

With positions expected from the path so far, matches near them are preferred.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.geometry import sample_map
from corrdit.grid import TokenGrid

FAR_SHARE = 0.02
"""Preference of a place far from the path, relative to one on it: a match fifty times better elsewhere is a jump."""


class Located(NamedTuple):
    """Matches of P points in one frame.

    Attributes:
        xy: `[P, 2]` (x, y) in tokens.
        score: `[P]` cost at the best token, 0 to 1.
        miss: `[P]` distance in tokens between the point and the match of its match; None where it was not asked for.
    """

    xy: Tensor
    score: Tensor
    miss: Tensor | None


def locate(
    rows: Tensor,
    place: Tensor,
    *,
    refine: int,
    expected: Tensor | None = None,
    spread: float = 0.0,
    back: Tensor | None = None,
) -> Located:
    """Where points are in a target frame.

    Args:
        rows: float `[V, P, h, w]`, V cost maps a point; the median of their positions in x and in y is taken.
        place: `[P, 2]` (x, y) of the points in the source frame, in tokens. A point between the outermost token
            centres and the border keeps its distance from the centre it is read at.
        refine: see `refined_peaks`.
        expected: `[P, 2]` in tokens, near which a match is preferred by `spread`, see `preferred_peaks`.
        back: `[h, w, 2]`, or `[P, h, w, 2]` for each point, the best source token (x, y) of each target token.
    """
    votes, points, height, width = rows.shape
    maps = rows.flatten(0, 1).float()
    if expected is None or spread == 0:
        peaks, score = refined_peaks(maps, refine)
    else:
        peaks, score = preferred_peaks(maps, expected.repeat(votes, 1), spread=spread, refine=refine)
    xy, score = (part.unflatten(0, (votes, points)).quantile(0.5, dim=0) for part in (peaks, score))
    last = torch.tensor([width - 1.0, height - 1.0])
    xy = xy + (place - torch.minimum(place.clamp(min=0), last))
    if back is None:
        return Located(xy, score, None)
    displacement = back - TokenGrid(1, height, width).coordinates().unflatten(0, (height, width))
    read_at = xy if back.ndim == 3 else xy.unsqueeze(1)
    returned = xy + sample_map(displacement, read_at).reshape(points, 2)
    return Located(xy, score, (returned - place).norm(dim=-1))


def refined_peaks(cost: Tensor, radius: int, *, best: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Position and height of the maximum of each cost map.

    Args:
        cost: float `[P, h, w]`, not negative.
        radius: tokens round the maximum over which the cost-weighted mean of positions is taken; 0 for the maximum.
            One beyond the frame takes the whole frame.
        best: int64 `[P]` flat tokens to take in place of the maxima.

    Returns:
        xy `[P, 2]` (x, y) in tokens, and score `[P]`, the maximum.
    """
    count, height, width = cost.shape
    if best is None:
        best = cost.flatten(1).argmax(-1)
    score = cost.flatten(1).gather(1, best.unsqueeze(1)).squeeze(1)
    row, column = best // width, best % width
    if radius == 0:
        return torch.stack((column, row), -1).to(cost.dtype), score
    radius = min(radius, max(height, width))
    offset = torch.arange(-radius, radius + 1, device=cost.device)
    rows, columns = row[:, None] + offset, column[:, None] + offset
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = (rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]).flatten(1)
    weight = cost.flatten(1).gather(1, flat).reshape(count, len(offset), len(offset)) * inside
    total = weight.sum((1, 2)).clamp(min=torch.finfo(cost.dtype).tiny)
    x = (weight.sum(1) * columns).sum(-1) / total
    y = (weight.sum(2) * rows).sum(-1) / total
    mean = torch.stack((x, y), -1)
    # A map without any weight has no mean; its first token stands.
    return torch.where((score > 0)[:, None], mean, torch.stack((column, row), -1).to(cost.dtype)), score


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
