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

from corrdit.kernels.displacement.folded import folded_forward, weighted_queries
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
        head_weights: read if WEIGHTED: float32 `[H]` of the probabilities, or if FOLDED `common` of `weighted_queries`.
        forward, backward: pointers to the base-2 log-sum-exp of the batch entry's first head; a head further on lies
            `forward_stride` (`backward_stride`) further, and `forward_places [M]` (`backward_places [N]`) within it.
        allowed_rows, allowed_columns: which tokens may be keys and are held by k; looked at if HAS_MASK or PARTS.
        FOLDED: whether `heads` heads make one softmax (averaged logits) or their softmaxes are averaged.
    """
    cost = tl.zeros([q_rows.shape[0], k_columns.shape[0]], tl.float32)
    if FOLDED:
        turns = 1
        depth = heads
        scale = weighted_scale(scale, head_weights, WEIGHTED)
    else:
        turns = heads
        depth = 1
    for turn in range(0, turns):
        head = first_head + turn
        share = 1.0
        if WEIGHTED and not FOLDED:
            share = tl.load(head_weights + head)
        if BIDIRECTIONAL:
            share = share * 0.5
        scores = head_scores(
            q, k, q_rows, k_columns, q_rows >= 0, allowed_columns, q_strides, k_strides, 1, group, head, depth, D,
            BLOCK_D, PARTS, PRECISION,
        )  # fmt: skip
        level = tl.load(forward + wide(turn) * forward_stride + forward_places)
        weights = exponentials(scores, scale, level[:, None])
        if HAS_MASK or PARTS:
            weights = tl.where(allowed_columns[None, :], weights, 0.0)
        cost += share * weights
        if BIDIRECTIONAL:
            scores = head_scores(
                k, q, k_rows, q_columns, allowed_rows, q_columns >= 0, k_strides, q_strides, group, 1, head,
                depth, D, BLOCK_D, PARTS, PRECISION,
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
        factors: float32 the kernel reads: weights `[H]`, or `common` of `weighted_queries`; None where each counts 1.
    """

    outer: int
    inner: int
    folded: bool
    factors: Tensor | None


class Arranged(NamedTuple):
    """What the kernels are given.

    Attributes:
        q: queries, times the weights of their heads for averaged logits.
        scale: factor of q.k, above 0. factor: turns a product into a base-2 exponent.
    """

    q: Tensor
    heads: Heads
    scale: float
    factor: float


def arrange(q: Tensor, heads: str, weights: Tensor | None, scale: float) -> Arranged:
    """The queries and the arrangement for a head mode; `weights` None stands for equal weights."""
    count = q.shape[1]
    q, scale = canonical(q, scale)
    if heads == "none":
        return Arranged(q, Heads(count, 1, False, None), scale, scale * LOG2_E)
    if heads == "logits":
        q, _, common = weighted_queries(q, weights)
        return Arranged(q, Heads(1, count, True, common), scale, scale * LOG2_E / count)
    if weights is None:
        weights = torch.full((count,), 1.0 / count, dtype=torch.float32, device=q.device)
    return Arranged(q, Heads(1, count, False, weights.to(torch.float32).contiguous()), scale, scale * LOG2_E)


def pair_statistics(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    arrangement: Heads,
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
        return folded_forward(q, k, arrangement.factors, table, scale * LOG2_E, key_mask, center, window)[1]
    return soft_forward(q, k, table, scale * LOG2_E, key_mask, center, window)[1]
