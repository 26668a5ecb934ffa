"""Cost rows: the operation and its registration with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.kernels.matching.correspondence import arrange_heads, exponent, pair_statistics
from corrdit.kernels.matching.token_rows import cost_of_rows, row_statistics
from corrdit.kernels.shared.launch import (
    canonical,
    check_device,
    check_tensors,
    float32_precision,
    product_precision,
    unequal_weights,
)


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
        segments = [(frame * frame_tokens, frame_tokens) for frame in range(frames)]
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
    q: Tensor, k: Tensor, tokens: Tensor, weights: Any, key_mask: Any, source: int, height: int, width: int,
    heads: str, scale: float, bidirectional: bool, precision: str,
) -> Tensor:  # fmt: skip
    size = height * width
    outer = q.shape[1] if heads == "none" else 1
    return q.new_empty(q.shape[0], outer, tokens.shape[0], q.shape[2] // size, size, dtype=torch.float32)


def cost_rows(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor,
    *,
    source: int,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
    memory_budget: int | None = None,
) -> Tensor:
    """float32 `[B, (H,) P, F, h, w]`; see `corrdit.ops.cost_rows`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    check_tensors(q, k)
    check_device(q)
    costs = _cost_rows(
        q.detach(), k.detach(), tokens, unequal_weights(weights), key_mask, source, grid.height, grid.width, heads,
        scale, bidirectional, product_precision(),
    ).unflatten(-1, (grid.height, grid.width))  # fmt: skip
    return costs if heads == "none" else costs.squeeze(1)
