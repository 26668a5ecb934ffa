"""Matching: the operation and its registration with torch.

The log-sum-exp of both directions for each head, then one pass over the cost with a running argmax: memory grows with
heads * tokens, not with tokens squared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.kernels.matching.best_match import best_match, token_positions
from corrdit.kernels.matching.correspondence import arrange, pair_statistics
from corrdit.kernels.matching.refinement import refine
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import unequal_weights
from corrdit.kernels.shared.tables import frame_pairs, made_outside, pair_places, row_count
from corrdit.problem import PairProblem, float32_precision


def compute_match(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    pairs: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    height: int,
    width: int,
    heads: str,
    scale: float,
    bidirectional: bool,
    radius: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(position `[B, H or 1, R, 2]`, score `[B, H or 1, R]`), both float32.

    Args:
        pairs, queries, keys: as in `compute_soft_displacement`.
    """
    table, swapped = (
        frame_pairs(flat, queries, keys, height, width, q.device) for flat in (pairs, swapped_pairs(pairs))
    )
    q, arrangement, scale, factor = arrange(q, heads, weights, scale)
    options = (arrangement, scale, key_mask)
    with float32_precision(precision):
        forward = pair_statistics(q, k, table, *options)
        backward = pair_statistics(q, k, swapped, *options) if bidirectional else None
        tokens, scores = best_match(
            q, k, table, arrangement, factor, key_mask, forward,
            swapped=swapped, backward=backward, allowed_only=False,
        )  # fmt: skip
        if radius == 0:
            return token_positions(tokens, width).to(torch.float32), scores
        positions = refine(
            q, k, table, arrangement, factor, key_mask, forward, swapped, backward, tokens, radius
        )  # fmt: skip
    return positions, scores


def swapped_pairs(pairs: Sequence[int]) -> list[int]:
    """(j0, i0, j1, i1, ...) of (i0, j0, i1, j1, ...)."""
    return [frame for both in zip(pairs[1::2], pairs[::2], strict=True) for frame in both]


_match = torch.library.custom_op("corrdit::match", compute_match, mutates_args=())


@_match.register_fake
def _(
    q: Tensor, k: Tensor, weights: object, key_mask: object, pairs: Sequence[int], queries: Sequence[int],
    keys: Sequence[int], height: int, width: int, heads: str, scale: float, bidirectional: bool, radius: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], q.shape[1] if heads == "none" else 1, row_count(pairs, queries))
    return q.new_empty(*shape, 2, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def match(q: Tensor, k: Tensor, problem: PairProblem, *, bidirectional: bool, refine: int) -> tuple[Tensor, Tensor]:
    """(xy `[B, H or 1, R, 2]`, score `[B, H or 1, R]`), float32; see `corrdit.ops.match`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem)
    pairs, places = pair_places(problem)
    for flat in (pairs, swapped_pairs(pairs)):
        made_outside(flat, *places, q)
    xy, score = _match(
        q.detach(), k.detach(), unequal_weights(problem.weights), problem.key_mask, pairs, *places, problem.heads,
        problem.factor, bidirectional, refine, problem.precision,
    )  # fmt: skip
    return xy, score
