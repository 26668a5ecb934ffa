"""Cost maps of chosen tokens by materialised score maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.reference.match import cost_map


def cost_rows(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor,
    *,
    source: int,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
    memory_budget: int | None = None,
) -> Tensor:
    """`[B, (H,) P, F, h, w]`; see `corrdit.ops.cost_rows`."""
    rows = [
        cost_map(
            q, k, grid, source, target,
            heads=heads, weights=weights, scale=scale, key_mask=key_mask, bidirectional=bidirectional,
        )[..., tokens, :]
        for target in range(grid.frames)
    ]  # fmt: skip
    return torch.stack(rows, dim=-2).unflatten(-1, (grid.height, grid.width))
