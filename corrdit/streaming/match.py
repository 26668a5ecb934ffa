"""Matching of one source frame with others, and cost rows of chosen tokens of it, in chunks of rows of C."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.streaming.blocks import PositionTable, outside_window, position_table
from corrdit.streaming.cost import CostRows


@torch.no_grad()
def match(q: Tensor, k: Tensor, problem: PairProblem, *, bidirectional: bool, refine: int) -> tuple[Tensor, Tensor]:
    """(xy `[B, H or 1, R, 2]`, score `[B, H or 1, R]`)."""
    grid, held = problem.grid, problem.queries.frames[problem.pairs[0][0]]
    cost = CostRows(q, k, problem, bidirectional=bidirectional, rows=held.tokens, purpose="matching")
    groups = cost.map_groups()
    table = position_table(grid.height, grid.width, torch.empty(0, dtype=cost.products.dtype, device=q.device))
    xy = torch.empty((q.shape[0], len(groups), problem.rows, 2), dtype=table.sums.dtype, device=q.device)
    score = torch.empty(xy.shape[:-1], dtype=table.sums.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            for number, maps in enumerate(groups):
                for (source, target), rows in zip(problem.pairs, problem.pair_rows(), strict=True):
                    pair = cost.of_frames(batch, maps, source, target)
                    for start in range(held.first, held.stop, cost.rows):
                        part = slice(start, min(start + cost.rows, held.stop))
                        begin = rows.start - held.first
                        place = (batch, number, slice(begin + part.start, begin + part.stop))
                        score[place], xy[place] = _best(pair.rows(part), table, refine)
                    del pair  # before the matrices of the next pair are made
    return xy, score


@torch.no_grad()
def cost_rows(q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, bidirectional: bool) -> Tensor:
    """`[B, H or 1, P, F, S]` of chosen tokens of the source frame, with every frame of the pairs."""
    cost = CostRows(q, k, problem, bidirectional=bidirectional, rows=tokens.numel(), purpose="cost rows")
    groups = cost.map_groups()
    shape = (q.shape[0], len(groups), tokens.numel(), len(problem.pairs), problem.grid.tokens_per_frame)
    result = torch.empty(shape, dtype=cost.products.dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            for number, maps in enumerate(groups):
                for order, (source, target) in enumerate(problem.pairs):
                    pair = cost.of_frames(batch, maps, source, target)
                    for start in range(0, tokens.numel(), cost.rows):
                        part = slice(start, start + cost.rows)
                        result[batch, number, part, order] = pair.rows(tokens[part])
                    del pair  # before the matrices of the next pair are made
    return result


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
