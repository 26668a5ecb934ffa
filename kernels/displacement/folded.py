"""Soft displacement of logits averaged over heads: one product over the folded axis H * D.

The mean over heads of q_h.k_h is concat(q).concat(k) / H, so the forward kernel walks heads and dims by their strides
and never copies. `folded_backward` has the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_forward import store_displacement
from corrdit.kernels.shared.launch import choose_tiles, launch
from corrdit.kernels.shared.primitives import (
    accumulate_moments,
    coordinate_tile,
    head_scores,
    key_frame,
    load_allowed,
    query_frame,
    weighted_scale,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.kernels.shared.windows import (
    block_count,
    block_tokens,
    held_tokens,
    load_centers,
    place_code,
    reciprocal,
    seen_keys,
    tile_codes,
    tile_corner,
    tile_tokens,
    window_bounds,
    window_kind,
    window_tiles,
)
from corrdit.problem import product_precision


@triton.jit
def folded_forward_kernel(
    q, k, head_weights, displacement, statistics, table, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, group, row_count, tiles, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch): displacement and base-2 log-sum-exp of its rows."""
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(1)
    q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    rows, kept_rows = block_tokens(tile, q_first, q_stop, width, BLOCK_M, WINDOW)
    # Rows past the end repeat the first one and are not stored, which saves the products their masks.
    q_rows = tl.where(kept_rows, rows, q_first)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + q_place * q_strides[2]
    k += wide(batch) * k_strides[0] + k_place * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + k_place * mask_strides[1]
    scale = weighted_scale(scale, head_weights, heads, WEIGHTED)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    center_x, center_y = load_centers(center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW)
    if WINDOW > 0:
        left, top, across, turns = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
        turns = tl.where(k_first < k_stop, turns, 0)
        inverse = reciprocal(across)
    else:
        # None where q holds less of this frame than of others.
        turns = tl.where(q_first + tile * BLOCK_M < q_stop, tl.cdiv(k_stop - k_first, BLOCK_N), 0)
    lowest, highest = window_bounds(center_x, center_y, radius, width, height)
    codes = tile_codes(BLOCK_N)
    for turn in range(0, turns):
        if WINDOW > 0:
            x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
            places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
        else:
            places = k_first + turn * BLOCK_N + columns
        tokens = held_tokens(places, k_first, k_stop)
        scores = head_scores(
            q, k, q_rows, tokens, kept_rows, kept_rows, q_strides, k_strides, 1, group, head_weights, 0, heads,
            D, BLOCK_D, WEIGHTED, False, PRECISION,
        )  # fmt: skip
        kept = load_allowed(key_mask, tokens, places == tokens, mask_strides[1], HAS_MASK)
        if WINDOW > 0:
            seen = seen_keys(codes, kept, lowest - corner, highest - corner, HAS_MASK or PARTS)
        else:
            seen = kept[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        coordinates = coordinate_tile(table, tokens, tokens, False)
        peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
    if COUNTED:
        tl.atomic_add(visited, turns)
    store_displacement(
        displacement, statistics, peak, moments, scale, width, rows, kept_rows, wide(batch) * row_count + row_place
    )


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
        float32 `[B, 1, R, 2]` and `[B, 1, R]`.
    """
    batch, heads, _, head_dim = q.shape
    displacement = torch.empty(batch, 1, table.rows, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, 1, table.rows, dtype=torch.float32, device=q.device)
    guarded = key_mask is not None or weights is not None
    tiles = choose_tiles("folded_forward_window" if window >= 0 else "folded_forward", q, guarded)
    blocks = block_count(tiles.rows, table.longest, table.height, table.width, window)
    mask = table.pairs if key_mask is None else key_mask
    exponent, factors = folded_scale(heads, scale, weights)
    launch(
        folded_forward_kernel, (len(table.pairs) * blocks, batch),
        q, k, table.pairs if factors is None else factors, displacement, statistics,
        coordinate_table(table.height, table.width, q.dtype, q.device), table.pairs, mask,
        table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, heads // k.shape[1], table.rows, blocks, table.width,
        table.height, exponent, window,
        D=head_dim, BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), PARTS=not table.whole, WEIGHTED=int(factors is not None),
        COUNTED=visited is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics
