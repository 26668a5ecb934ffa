"""Matching of one source frame with target frames, in chunks of cost rows."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.streaming.blocks import PositionTable, outside_window, position_table
from corrdit.streaming.cost import CostProblem, CostRows


@torch.no_grad()
def match(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    source: int,
    targets: list[int],
    *,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
    refine: int,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(xy `[B, (H,) Ft, h, w, 2]`, score `[B, (H,) Ft, h, w]`); see `corrdit.ops.match`."""
    problem = CostProblem(grid, heads, weights, scale, key_mask, bidirectional, memory_budget)
    tokens = grid.tokens_per_frame
    cost = CostRows(q, k, problem, rows=tokens, purpose="matching")
    groups = cost.map_groups()
    table = position_table(grid.height, grid.width, torch.empty(0, dtype=cost.products.dtype, device=q.device))
    xy = torch.empty((q.shape[0], len(groups), len(targets), tokens, 2), dtype=table.sums.dtype, device=q.device)
    score = torch.empty(xy.shape[:-1], dtype=table.sums.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            for number, maps in enumerate(groups):
                for order, target in enumerate(targets):
                    pair = cost.of_frames(batch, maps, source, target)
                    for start in range(0, tokens, cost.rows):
                        part = slice(start, min(start + cost.rows, tokens))
                        place = (batch, number, order, part)
                        score[place], xy[place] = _best(pair.rows(part), table, refine)
    xy, score = xy.unflatten(-2, (grid.height, grid.width)), score.unflatten(-1, (grid.height, grid.width))
    return (xy, score) if heads == "none" else (xy.squeeze(1), score.squeeze(1))


def _best(cost: Tensor, table: PositionTable, refine: int) -> tuple[Tensor, Tensor]:
    """Largest cost `[n]` of each row and its position `[n, 2]`, or the cost-weighted mean position round it."""
    score, best = cost.max(-1)
    positions = table.sums[1:].t()
    place = positions[best]
    if refine == 0:
        return score, place
    weight = cost.masked_fill_(outside_window(place, table, refine).squeeze(1), 0.0)
    sums = torch.mm(table.sums, weight.t())
    # Without any weight (every key removed) the mean is not defined and the best key stands.
    return score, torch.where((sums[0] == 0).unsqueeze(-1), place, (sums[1:] / sums[0]).t())
