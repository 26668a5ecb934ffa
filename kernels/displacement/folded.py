"""Soft displacement of logits averaged over heads: one product over the folded axis H * D.

The mean over heads of q_h.k_h is concat(q).concat(k) / H, so the forward kernel walks heads and dims by their strides
and never copies. `folded_backward` has the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_forward import (
    key_range,
    load_centers,
    masked_scores,
    store_displacement,
    window_kind,
)
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import accumulate_moments, coordinate_tile, head_scores, weighted_scale, wide
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.problem import product_precision


@triton.jit
def folded_forward_kernel(
    q, k, head_weights, displacement, statistics, table, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, pair_count, frame_tokens, width, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch): displacement and base-2 log-sum-exp of its rows."""
    tiles = tl.cdiv(frame_tokens, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = tl.program_id(1)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < frame_tokens
    # Rows past the end repeat the last one and are not stored, which saves the products their masks.
    q_rows = tl.minimum(rows, frame_tokens - 1)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + wide(tl.load(pairs + 2 * pair)) * frame_tokens * q_strides[2]
    key_frame = wide(tl.load(pairs + 2 * pair + 1))
    k += wide(batch) * k_strides[0] + key_frame * frame_tokens * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + key_frame * frame_tokens * mask_strides[1]

    first_row = (wide(batch) * pair_count + pair) * frame_tokens
    center_x, center_y = load_centers(center, first_row, rows, kept_rows, width, WINDOW)
    start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
    scale = weighted_scale(scale, head_weights, heads, WEIGHTED)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    for first in range(start, end, BLOCK_N):
        inside = first + columns < end
        k_rows = tl.minimum(first + columns, frame_tokens - 1)
        scores = head_scores(
            q, k, q_rows, k_rows, kept_rows, inside, q_strides, k_strides, head_weights, 0, heads,
            D, BLOCK_D, WEIGHTED, False, PRECISION,
        )  # fmt: skip
        scores = masked_scores(
            scores, first + columns, inside, key_mask, mask_strides[1], center_x, center_y, radius, width,
            HAS_MASK, WINDOW,
        )  # fmt: skip
        coordinates = coordinate_tile(table + first * 16, columns, inside, True)
        peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
    if COUNTED:
        tl.atomic_add(visited, tl.cdiv(end - start, BLOCK_N))
    store_displacement(displacement, statistics, peak, moments, scale, width, rows, kept_rows, first_row)


def folded_scale(heads: int, scale: float, weights: Tensor | None) -> tuple[float, Tensor | None]:
    """(factor of the exponent, factors of the query heads): the mean over heads is one division by H.

    With weights, the queries of head h are multiplied by its weight over the largest, which cannot leave the range of
    float16, and the exponent by H times the largest: `[H + 1]`, with that last. See `weighted_scale`.
    """
    if weights is None:
        return scale / heads, None
    weights = weights.to(torch.float32)
    largest = weights.amax().reshape(1)
    return scale / heads, torch.cat((weights / largest, largest * heads))


def folded_forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    table: FramePairTable,
    height: int,
    width: int,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement and log-sum-exp of the logits averaged over heads.

    Args:
        weights: `[H]` summing to 1, None for the mean. The rest as in `soft_forward`.

    Returns:
        float32 `[B, 1, P, S, 2]` and `[B, 1, P, S]`.
    """
    batch, heads, _, head_dim = q.shape
    frame_tokens, pair_count = height * width, table.pairs.shape[0]
    displacement = torch.empty(batch, 1, pair_count, frame_tokens, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, 1, pair_count, frame_tokens, dtype=torch.float32, device=q.device)
    guarded = key_mask is not None or window >= 0 or weights is not None
    tiles = choose_tiles("folded_forward", q, guarded)
    mask = table.pairs if key_mask is None else key_mask
    exponent, factors = folded_scale(heads, scale, weights)
    launch(
        folded_forward_kernel, (pair_count * tile_count(frame_tokens, tiles.rows), batch),
        q, k, table.pairs if factors is None else factors, displacement, statistics,
        coordinate_table(height, width, q.dtype, q.device), table.pairs, mask,
        table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, pair_count, frame_tokens, width, exponent, window,
        D=head_dim, BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), WEIGHTED=int(factors is not None), COUNTED=visited is not None,
        PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics
