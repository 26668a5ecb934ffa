"""Hard displacement: the operation and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.kernels.matching.best_match import best_match, token_positions
from corrdit.kernels.matching.correspondence import arrange_heads, exponent, pair_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import canonical, unequal_weights
from corrdit.kernels.shared.tables import made_outside, window_centers, window_radius
from corrdit.problem import PairProblem, float32_precision


def compute_hard_displacement(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    pairs: Sequence[int],
    height: int,
    width: int,
    heads: str,
    scale: float,
    window: int,
    precision: str,
) -> Tensor:
    """int64 `[B, H or 1, P, S, 2]`."""
    arrangement = arrange_heads(q, heads, weights)
    both = list(zip(pairs[::2], pairs[1::2], strict=True))
    q, factor = exponent(q, scale, arrangement)
    with float32_precision(precision):
        forward = None
        if heads == "probabilities":
            positive = canonical(q, scale)[1]
            forward = pair_statistics(
                q, k, both, height, width, arrangement, weights, positive, key_mask, center, window
            )
        tokens, _ = best_match(
            q, k, both, height, width, arrangement, factor, key_mask,
            forward=forward, allowed_only=True, center=center, window=window,
        )  # fmt: skip
    own = torch.arange(height * width, device=q.device)
    return token_positions(tokens, width) - token_positions(own, width)


_hard_displacement = torch.library.custom_op("corrdit::hard_displacement", compute_hard_displacement, mutates_args=())


@_hard_displacement.register_fake
def _(
    q: Tensor, k: Tensor, weights: object, key_mask: object, center: object, pairs: Sequence[int], height: int,
    width: int, heads: str, scale: float, window: int, precision: str,
) -> Tensor:  # fmt: skip
    outer = q.shape[1] if heads == "none" else 1
    return q.new_empty(q.shape[0], outer, len(pairs) // 2, height * width, 2, dtype=torch.int64)


def hard_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
    """int64 `[B, H or 1, R, 2]`; arguments and errors as in `corrdit.kernels.soft_displacement`."""
    q, k, problem = kernel_input(q, k, problem)
    pairs = [frame for pair in problem.pairs for frame in pair]
    made_outside(pairs, problem.grid.frames, problem.grid.height, problem.grid.width, q)
    return _hard_displacement(
        q.detach(),
        k.detach(),
        unequal_weights(problem.weights),
        problem.key_mask,
        window_centers(problem),
        pairs,
        problem.grid.height,
        problem.grid.width,
        problem.heads,
        problem.factor,
        window_radius(problem),
        problem.precision,
    ).flatten(2, 3)
