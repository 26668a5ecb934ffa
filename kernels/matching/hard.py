"""Hard displacement: the operation and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.kernels.matching.best_match import best_match, token_positions
from corrdit.kernels.matching.best_product import best_product
from corrdit.kernels.matching.correspondence import arrange, pair_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import unequal_weights
from corrdit.kernels.shared.tables import (
    frame_pairs,
    made_outside,
    pair_places,
    row_count,
    window_centers,
    window_radius,
)
from corrdit.problem import PairProblem, float32_precision


def compute_hard_displacement(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    pairs: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    height: int,
    width: int,
    heads: str,
    scale: float,
    window: int,
    precision: str,
) -> Tensor:
    """int64 `[B, H or 1, R, 2]`; pairs, queries, keys as in `compute_soft_displacement`."""
    table = frame_pairs(pairs, queries, keys, height, width, q.device)
    q, arrangement, scale, factor = arrange(q, heads, weights, scale)
    with float32_precision(precision):
        if heads == "probabilities":
            forward = pair_statistics(q, k, table, arrangement, scale, key_mask, center, window)
            tokens, _ = best_match(
                q, k, table, arrangement, factor, key_mask, forward, allowed_only=True, center=center, window=window
            )
        else:
            tokens = best_product(q, k, table, arrangement, key_mask, center, window)
    held = [torch.arange(queries[3 * i + 1], queries[3 * i + 2], device=q.device) for i in pairs[::2]]
    return token_positions(tokens, width) - token_positions(torch.cat(held), width)


_hard_displacement = torch.library.custom_op("corrdit::hard_displacement", compute_hard_displacement, mutates_args=())


@_hard_displacement.register_fake
def _(
    q: Tensor, k: Tensor, weights: object, key_mask: object, center: object, pairs: Sequence[int],
    queries: Sequence[int], keys: Sequence[int], height: int, width: int, heads: str, scale: float, window: int,
    precision: str,
) -> Tensor:  # fmt: skip
    outer = q.shape[1] if heads == "none" else 1
    return q.new_empty(q.shape[0], outer, row_count(pairs, queries), 2, dtype=torch.int64)


def hard_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
    """int64 `[B, H or 1, R, 2]`; arguments and errors as in `corrdit.kernels.soft_displacement`."""
    q, k, problem = kernel_input(q, k, problem)
    pairs, places = pair_places(problem)
    made_outside(pairs, *places, q)
    return _hard_displacement(
        q.detach(),
        k.detach(),
        unequal_weights(problem.weights),
        problem.key_mask,
        window_centers(problem),
        pairs,
        *places,
        problem.heads,
        problem.factor,
        window_radius(problem),
        problem.precision,
    )
