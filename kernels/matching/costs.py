"""Cost rows: the operation and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.kernels.matching.correspondence import arrange, pair_statistics
from corrdit.kernels.matching.token_rows import cost_of_rows, row_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import unequal_weights
from corrdit.kernels.shared.tables import frame_pairs, made_outside, pair_places, segments_made_outside
from corrdit.problem import PairProblem, float32_precision


def frame_segments(keys: Sequence[int]) -> list[int]:
    """(first token, tokens) of what k holds of every frame, flat; see `TokenAxis.places`."""
    return [
        number
        for place, first, stop in zip(keys[::3], keys[1::3], keys[2::3], strict=True)
        for number in (place + first, stop - first)
    ]


def towards_source(frames: int, source: int) -> list[int]:
    """The pairs of every frame's queries and the source frame's keys, flat."""
    return [number for frame in range(frames) for number in (frame, source)]


def compute_cost_rows(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    source: int,
    queries: Sequence[int],
    keys: Sequence[int],
    height: int,
    width: int,
    heads: str,
    scale: float,
    bidirectional: bool,
    precision: str,
) -> Tensor:
    """float32 `[B, H or 1, P, F, S]` of the tokens `[P]` of the source frame; queries, keys: see `TokenAxis.places`."""
    q, arrangement, scale, factor = arrange(q, heads, weights, scale)
    # Every target token's softmax over the whole source frame, however few rows are asked for.
    table = frame_pairs(towards_source(len(queries) // 3, source), queries, keys, height, width, q.device)
    tokens = tokens.to(torch.int64)
    with float32_precision(precision):
        forward = row_statistics(
            q, k, tokens + queries[3 * source], frame_segments(keys), arrangement, factor, key_mask
        )
        backward = pair_statistics(q, k, table, arrangement, scale, key_mask) if bidirectional else None
        return cost_of_rows(q, k, tokens, source, table, arrangement, factor, key_mask, forward, backward)


_cost_rows = torch.library.custom_op("corrdit::cost_rows", compute_cost_rows, mutates_args=())


@_cost_rows.register_fake
def _(
    q: Tensor, k: Tensor, tokens: Tensor, weights: object, key_mask: object, source: int, queries: Sequence[int],
    keys: Sequence[int], height: int, width: int, heads: str, scale: float, bidirectional: bool, precision: str,
) -> Tensor:  # fmt: skip
    outer = q.shape[1] if heads == "none" else 1
    return q.new_empty(q.shape[0], outer, tokens.shape[0], len(queries) // 3, height * width, dtype=torch.float32)


def cost_rows(q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, bidirectional: bool) -> Tensor:
    """float32 `[B, H or 1, P, F, S]`; see `corrdit.ops.cost_rows`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem)
    source = problem.pairs[0][0]
    _, places = pair_places(problem)
    made_outside(towards_source(problem.grid.frames, source), *places, q)
    segments_made_outside(frame_segments(places[1]), q)
    return _cost_rows(
        q.detach(), k.detach(), tokens, unequal_weights(problem.weights), problem.key_mask, source, *places,
        problem.heads, problem.factor, bidirectional, problem.precision,
    )  # fmt: skip
