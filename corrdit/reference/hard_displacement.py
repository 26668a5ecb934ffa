"""Displacement to the best key by materialised score maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.reference.scores import (
    allowed_keys,
    frame,
    held_rows,
    logits_between,
    masked_softmax,
    on_whole_grid,
    reduce_heads,
)


def hard_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
    """int64 `[B, H or 1, R, 2]`."""
    grid = problem.grid
    q, k, mask = on_whole_grid(q, k, problem)
    position = grid.coordinates(q.device).long()
    displacements = []
    for index, (i, j) in enumerate(problem.pairs):
        score = logits_between(frame(q, grid, i), frame(k, grid, j), problem)
        allowed = allowed_keys(problem, index, mask, q.device)
        if problem.heads == "probabilities":
            score = reduce_heads(masked_softmax(score, allowed), problem)
        displacements.append(displacement_to_best(score, allowed, position))
    return held_rows(displacements, problem)


def displacement_to_best(score: Tensor, allowed: Tensor | None, position: Tensor) -> Tensor:
    """`[..., S, 2]` from each query to the first best allowed key of `[..., S, S]`; 0 for a row without keys."""
    if allowed is None:
        return position[score.argmax(-1)] - position
    allowed = allowed.expand_as(score)
    best = score.masked_fill(~allowed, float("-inf")).argmax(-1)
    # A row whose allowed scores are all -inf would otherwise take a removed key of lower index.
    first_allowed = allowed.int().argmax(-1)
    best = torch.where(allowed.gather(-1, best.unsqueeze(-1)).squeeze(-1), best, first_allowed)
    return (position[best] - position) * allowed.any(-1, keepdim=True)
