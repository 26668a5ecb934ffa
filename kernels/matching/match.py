"""Matching: the operation and its registration with torch.

The log-sum-exp of both directions for each head, then one pass over the cost with a running argmax: memory grows with
heads * tokens, not with tokens squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.kernels.matching.best_match import best_match, token_positions
from corrdit.kernels.matching.correspondence import arrange_heads, exponent, pair_statistics
from corrdit.kernels.matching.refinement import refine
from corrdit.kernels.shared.launch import (
    canonical,
    check_device,
    check_tensors,
    float32_precision,
    product_precision,
    unequal_weights,
)


def compute_match(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    pairs: Sequence[int],
    height: int,
    width: int,
    heads: str,
    scale: float,
    bidirectional: bool,
    radius: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(position `[B, H or 1, P, S, 2]`, score `[B, H or 1, P, S]`), both float32."""
    arrangement = arrange_heads(q, heads, weights)
    both = list(zip(pairs[::2], pairs[1::2], strict=True))
    swapped = [(j, i) for i, j in both]
    positive = canonical(q, scale)[1]
    q, factor = exponent(q, scale, arrangement)
    options = (height, width, arrangement, weights, positive, key_mask)
    with float32_precision(precision):
        forward = pair_statistics(q, k, both, *options)
        backward = pair_statistics(q, k, swapped, *options) if bidirectional else None
        tokens, scores = best_match(
            q, k, both, height, width, arrangement, factor, key_mask,
            forward=forward, backward=backward, allowed_only=False,
        )  # fmt: skip
        if radius == 0:
            return token_positions(tokens, width).to(torch.float32), scores
        positions = refine(
            q, k, both, height, width, arrangement, factor, key_mask, forward, backward, tokens, radius
        )  # fmt: skip
    return positions, scores


_match = torch.library.custom_op("corrdit::match", compute_match, mutates_args=())


@_match.register_fake
def _(
    q: Tensor, k: Tensor, weights: Any, key_mask: Any, pairs: Sequence[int], height: int, width: int, heads: str,
    scale: float, bidirectional: bool, radius: int, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], q.shape[1] if heads == "none" else 1, len(pairs) // 2, height * width)
    return q.new_empty(*shape, 2, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def match(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    source: int,
    targets: list[int],
    *,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
    refine: int,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(xy `[B, (H,) Ft, h, w, 2]`, score `[B, (H,) Ft, h, w]`), float32; see `corrdit.ops.match`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    check_tensors(q, k)
    check_device(q)
    pairs = [frame for target in targets for frame in (source, target)]
    xy, score = _match(
        q.detach(), k.detach(), unequal_weights(weights), key_mask, pairs,
        grid.height, grid.width, heads, scale, bidirectional, refine, product_precision(),
    )  # fmt: skip
    xy, score = xy.unflatten(-2, (grid.height, grid.width)), score.unflatten(-1, (grid.height, grid.width))
    return (xy, score) if heads == "none" else (xy.squeeze(1), score.squeeze(1))
