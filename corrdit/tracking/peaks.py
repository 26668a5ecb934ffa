"""From cost maps to positions: the best token, refined below the token."""

from __future__ import annotations

import torch
from torch import Tensor


def refined_peaks(cost: Tensor, radius: int, *, best: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Position and height of the maximum of each cost map.

    Args:
        cost: float `[P, h, w]`, not negative.
        radius: tokens round the maximum over which the cost-weighted mean of positions is taken; 0 for the maximum.
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
