"""Soft displacement by materialised score maps."""

from __future__ import annotations

from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.reference.scores import (
    allowed_keys,
    frame,
    held_rows,
    log_sum_exp,
    logits_between,
    masked_softmax,
    on_whole_grid,
    reduce_heads,
)


def soft_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
    """(displacement `[B, H or 1, R, 2]`, log-sum-exp `[B, H or 1, R]` if asked for)."""
    grid = problem.grid
    q, k, mask = on_whole_grid(q, k, problem)
    displacements, sums = [], []
    for index, (i, j) in enumerate(problem.pairs):
        logits = logits_between(frame(q, grid, i), frame(k, grid, j), problem)
        allowed = allowed_keys(problem, index, mask, q.device)
        probability = masked_softmax(logits, allowed)
        position = grid.coordinates(q.device, probability.dtype)
        # sum_p' P[p, p'] (p' - p), written so that a row without keys gives 0.
        moved = probability @ position - probability.sum(-1, keepdim=True) * position
        displacements.append(reduce_heads(moved, problem))
        if problem.with_lse:
            sums.append(log_sum_exp(logits, allowed))
    return held_rows(displacements, problem), held_rows(sums, problem) if sums else None
