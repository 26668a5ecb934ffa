"""Tiles of the cost C, and what every kernel that reads them shares.

`C[p, p'] = P_forward[p, p']`, or its mean with the transposed backward softmax `P_backward[p', p]`. With the
log-sum-exp of each direction known, a tile of C takes one product for each direction and head, and no second pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.folded import folded_forward, folded_scale
from corrdit.kernels.displacement.soft_forward import soft_forward
from corrdit.kernels.shared.launch import LOG2_E, canonical
from corrdit.kernels.shared.primitives import exponentials, head_scores, weighted_scale, wide
from corrdit.kernels.shared.tables import FramePairTable


@triton.jit
def cost_tile(
    q, k, head_weights, forward, backward, q_rows, k_columns, k_rows, q_columns, allowed_rows, allowed_columns,
    forward_places, backward_places, forward_stride, backward_stride, q_strides, k_strides, group, first_head, heads,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, FOLDED: tl.constexpr, BIDIRECTIONAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[M, N]` cost of M source tokens with N target tokens.

    Args:
        q, k: pointers to the batch entry. q_rows `[M]`, k_columns `[N]`: where source tokens stand in q and target
            tokens in k; k_rows, q_columns: the other way round, for the backward direction. All are there to be read,
            those of k if PARTS where allowed.
        head_weights: float32 `[H]`: weights of the probabilities; FOLDED and WEIGHTED: `[H + 1]`, see `head_scores`.
        forward, backward: pointers to the base-2 log-sum-exp of the batch entry's first head; a head further on lies
            `forward_stride` (`backward_stride`) further, and `forward_places [M]` (`backward_places [N]`) within it.
        allowed_rows, allowed_columns: which tokens may be keys and are held by k; looked at if HAS_MASK or PARTS.
        FOLDED: whether `heads` heads make one softmax (averaged logits) or their softmaxes are averaged.
    """
    cost = tl.zeros([q_rows.shape[0], k_columns.shape[0]], tl.float32)
    if FOLDED:
        turns = 1
        depth = heads
        scale = weighted_scale(scale, head_weights, heads, WEIGHTED)
    else:
        turns = heads
        depth = 1
    FIRST: tl.constexpr = 1 if WEIGHTED and FOLDED else 0
    SECOND: tl.constexpr = 2 if WEIGHTED and FOLDED else 0
    for turn in range(0, turns):
        head = first_head + turn
        share = 1.0
        if WEIGHTED and not FOLDED:
            share = tl.load(head_weights + head)
        if BIDIRECTIONAL:
            share = share * 0.5
        scores = head_scores(
            q, k, q_rows, k_columns, q_rows >= 0, allowed_columns, q_strides, k_strides, 1, group, head_weights, head,
            depth, D, BLOCK_D, FIRST, PARTS, PRECISION,
        )  # fmt: skip
        level = tl.load(forward + wide(turn) * forward_stride + forward_places)
        weights = exponentials(scores, scale, level[:, None])
        if HAS_MASK or PARTS:
            weights = tl.where(allowed_columns[None, :], weights, 0.0)
        cost += share * weights
        if BIDIRECTIONAL:
            scores = head_scores(
                k, q, k_rows, q_columns, allowed_rows, q_columns >= 0, k_strides, q_strides, group, 1, head_weights,
                head, depth, D, BLOCK_D, SECOND, PARTS, PRECISION,
            )  # fmt: skip
            level = tl.load(backward + wide(turn) * backward_stride + backward_places)
            weights = exponentials(scores, scale, level[None, :])
            if HAS_MASK or PARTS:
                weights = tl.where(allowed_rows[:, None], weights, 0.0)
            cost += share * weights
    return cost


class Heads(NamedTuple):
    """How the heads enter a kernel that reads cost tiles.

    Attributes:
        outer: heads of the result. inner: heads that make up one of them.
        folded: whether the inner heads make one softmax.
        factors: float32 weights the kernel reads: `[H]`, or `[H + 1]` of `folded_scale`; None where each counts 1.
    """

    outer: int
    inner: int
    folded: bool
    factors: Tensor | None


def arrange_heads(q: Tensor, heads: str, weights: Tensor | None) -> Heads:
    """The arrangement for a head mode; `weights` None stands for equal weights."""
    count = q.shape[1]
    if heads == "none":
        return Heads(count, 1, False, None)
    if heads == "logits":
        return Heads(1, count, True, folded_scale(count, 1.0, weights)[1])
    if weights is None:
        weights = torch.full((count,), 1.0 / count, dtype=torch.float32, device=q.device)
    return Heads(1, count, False, weights.to(torch.float32).contiguous())


def exponent(q: Tensor, scale: float, arrangement: Heads) -> tuple[Tensor, float]:
    """(q, factor above 0 that turns a product into a base-2 exponent); see `canonical`."""
    q, factor = canonical(q, scale)
    return q, factor * LOG2_E / (arrangement.inner if arrangement.folded else 1)


def pair_statistics(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    arrangement: Heads,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None = None,
    window: int = -1,
) -> Tensor:
    """Base-2 log-sum-exp `[B, H, R]` (`[B, 1, R]` for folded heads) of the frame pairs.

    Args:
        scale: factor of q.k, above 0. center: int32 `[B, R, 2]`.
    """
    if arrangement.folded:
        return folded_forward(q, k, weights, table, scale * LOG2_E, key_mask, center, window)[1]
    return soft_forward(q, k, table, scale * LOG2_E, key_mask, center, window)[1]
