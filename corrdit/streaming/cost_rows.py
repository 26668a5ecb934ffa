"""Cost rows of chosen tokens of the source frame in every frame."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.streaming.cost import CostProblem, CostRows


@torch.no_grad()
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
    problem = CostProblem(grid, heads, weights, scale, key_mask, bidirectional, memory_budget)
    cost = CostRows(q, k, problem, rows=tokens.numel(), purpose="cost rows")
    groups = cost.map_groups()
    shape = (q.shape[0], len(groups), tokens.numel(), grid.frames, grid.tokens_per_frame)
    result = torch.empty(shape, dtype=cost.products.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            for number, maps in enumerate(groups):
                for frame in range(grid.frames):
                    pair = cost.of_frames(batch, maps, source, frame)
                    for start in range(0, tokens.numel(), cost.rows):
                        part = slice(start, start + cost.rows)
                        result[batch, number, part, frame] = pair.rows(tokens[part])
    result = result.unflatten(-1, (grid.height, grid.width))
    return result if heads == "none" else result.squeeze(1)
