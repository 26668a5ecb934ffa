"""Cost rows: the operation and its registration with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.kernels.matching.correspondence import arrange_heads, exponent, pair_statistics
from corrdit.kernels.matching.token_rows import cost_of_rows, row_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import canonical, unequal_weights
from corrdit.kernels.shared.tables import made_outside, segments_made_outside
from corrdit.problem import PairProblem, float32_precision


def frame_segments(frames: int, frame_tokens: int) -> list[tuple[int, int]]:
    """(first token, tokens) of every frame."""
    return [(frame * frame_tokens, frame_tokens) for frame in range(frames)]


def compute_cost_rows(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    source: int,
    height: int,
    width: int,
    heads: str,
    scale: float,
    bidirectional: bool,
    precision: str,
) -> Tensor:
    """float32 `[B, H or 1, R, F, S]`."""
    frame_tokens = height * width
    frames = q.shape[2] // frame_tokens
    arrangement = arrange_heads(q, heads, weights)
    positive = canonical(q, scale)[1]
    q, factor = exponent(q, scale, arrangement)
    rows = tokens.to(torch.int64) + source * frame_tokens
    with float32_precision(precision):
        segments = frame_segments(frames, frame_tokens)
        forward = row_statistics(q, k, rows, segments, arrangement, factor, key_mask)
        backward = None
        if bidirectional:
            # Every target token's softmax over the whole source frame, however few rows are asked for.
            towards = [(frame, source) for frame in range(frames)]
            backward = pair_statistics(
                q, k, towards, height, width, arrangement, weights, positive, key_mask
            )  # fmt: skip
        return cost_of_rows(q, k, rows, frames, arrangement, factor, key_mask, forward, backward)


_cost_rows = torch.library.custom_op("corrdit::cost_rows", compute_cost_rows, mutates_args=())


@_cost_rows.register_fake
def _(
    q: Tensor, k: Tensor, tokens: Tensor, weights: object, key_mask: object, source: int, height: int, width: int,
    heads: str, scale: float, bidirectional: bool, precision: str,
) -> Tensor:  # fmt: skip
    size = height * width
    outer = q.shape[1] if heads == "none" else 1
    return q.new_empty(q.shape[0], outer, tokens.shape[0], q.shape[2] // size, size, dtype=torch.float32)


def cost_rows(q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, bidirectional: bool) -> Tensor:
    """float32 `[B, H or 1, P, F, S]`; see `corrdit.ops.cost_rows`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem)
    grid = problem.grid
    towards = [frame for source, target in problem.pairs for frame in (target, source)]
    made_outside(towards, grid.frames, grid.height, grid.width, q)
    segments_made_outside(frame_segments(grid.frames, grid.tokens_per_frame), q)
    return _cost_rows(
        q.detach(), k.detach(), tokens, unequal_weights(problem.weights), problem.key_mask, problem.pairs[0][0],
        problem.grid.height, problem.grid.width, problem.heads, problem.factor, bidirectional, problem.precision,
    )  # fmt: skip
