"""Matching and cost rows by materialised cost maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem
from corrdit.reference.scores import (
    frame,
    held_rows,
    logits_between,
    masked_softmax,
    on_whole_grid,
    reduce_heads,
    window_mask,
)


def match(q: Tensor, k: Tensor, problem: PairProblem, *, bidirectional: bool, refine: int) -> tuple[Tensor, Tensor]:
    """(xy `[B, H or 1, R, 2]`, score `[B, H or 1, R]`)."""
    positions, scores = [], []
    for cost in _cost_maps(q, k, problem, bidirectional):
        score, best = cost.max(-1)
        positions.append(refined_position(cost, best, problem.grid, refine))
        scores.append(score)
    return held_rows(positions, problem), held_rows(scores, problem)


def cost_rows(q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, bidirectional: bool) -> Tensor:
    """`[B, H or 1, P, F, S]` of chosen tokens of the source frame, with every frame of the pairs."""
    return torch.stack([cost[..., tokens, :] for cost in _cost_maps(q, k, problem, bidirectional)], dim=-2)


def _cost_maps(q: Tensor, k: Tensor, problem: PairProblem, bidirectional: bool) -> Iterator[Tensor]:
    """C `[B, H or 1, S source, S target]` of each pair: the forward softmax, or its mean with the transposed backward
    softmax."""
    q, k, mask = on_whole_grid(q, k, problem)

    def probability(query_frame: int, key_frame: int) -> Tensor:
        logits = logits_between(frame(q, problem.grid, query_frame), frame(k, problem.grid, key_frame), problem)
        allowed = None if mask is None else frame(mask, problem.grid, key_frame)[:, None, None, :]
        return reduce_heads(masked_softmax(logits, allowed), problem)

    for source, target in problem.pairs:
        forward = probability(source, target)
        yield (forward + probability(target, source).transpose(-1, -2)) / 2 if bidirectional else forward


def refined_position(cost: Tensor, best: Tensor, grid: TokenGrid, refine: int) -> Tensor:
    """`[..., S, 2]` position of the best key, or the cost-weighted mean of positions within `refine` tokens of it."""
    position = grid.coordinates(cost.device, cost.dtype)
    if refine == 0:
        return position[best]
    near = window_mask(grid, refine, None, cost.device)[0, 0][best]
    weight = torch.where(near, cost, torch.zeros_like(cost))
    total = weight.sum(-1, keepdim=True)
    # Without any weight (every key removed) the mean is not defined and the best key stands.
    return torch.where(total == 0, position[best], weight @ position / total)
