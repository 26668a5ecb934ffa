"""Soft displacement of each head by itself: the forward kernel and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch
from corrdit.kernels.shared.primitives import (
    COORDINATE_LANES,
    accumulate_moments,
    coordinate_tile,
    key_frame,
    lane,
    load_allowed,
    load_tile,
    log_sum_exp,
    product,
    query_frame,
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
    stretch_tokens,
    tile_codes,
    tile_corner,
    tile_tokens,
    window_bounds,
    window_kind,
    window_tiles,
)
from corrdit.problem import product_precision


@triton.jit
def guarded_tile(
    peak, moments, q_tile, k, table, tokens, seen, dims, k_strides, scale, D: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile of keys, all of which are there to be read, and some of which are not `seen [M or 1, N]`."""
    k_tile = load_tile(k, tokens, dims, k_strides, tokens, False, D)  # [N, D]
    coordinates = coordinate_tile(table, tokens, tokens, False)
    scores = tl.where(seen, product(q_tile, tl.trans(k_tile), PRECISION), float("-inf"))
    return accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)


@triton.jit
def full_scores(q_tile, k, columns, dims, k_strides, unused, D: tl.constexpr, PRECISION: tl.constexpr):
    """`[M, N]` scores of the keys from `k` on, all of them inside."""
    k_tile = load_tile(k, columns, dims, k_strides, unused, False, D)  # [N, D]
    return product(q_tile, tl.trans(k_tile), PRECISION)


@triton.jit
def soft_forward_kernel(
    q, k, displacement, statistics, table, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, group, row_count, tiles, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch * head): displacement and base-2 log-sum-exp of its rows."""
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    rows, kept_rows = block_tokens(tile, q_first, q_stop, width, BLOCK_M, WINDOW)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1] + q_place * q_strides[2]
    k += wide(batch) * k_strides[0] + wide(head // group) * k_strides[1] + k_place * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + k_place * mask_strides[1]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    if WINDOW > 0:
        center_x, center_y = load_centers(center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW)
        left, top, across, count = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
        count = tl.where(k_first < k_stop, count, 0)
        lowest, highest = window_bounds(center_x, center_y, radius, width, height)
        inverse = reciprocal(across)
        codes = tile_codes(BLOCK_N)
        for turn in range(0, count):
            x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
            places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
            tokens = held_tokens(places, k_first, k_stop)
            kept = load_allowed(key_mask, tokens, places == tokens, mask_strides[1], HAS_MASK)
            seen = seen_keys(codes, kept, lowest - corner, highest - corner, HAS_MASK or PARTS)
            peak, moments = guarded_tile(
                peak, moments, q_tile, k, table, tokens, seen, dims, k_strides, scale, D, PRECISION
            )
    else:
        # None where q holds less of this frame than of others.
        count = tl.where(q_first + tile * BLOCK_M < q_stop, k_stop - k_first, 0)
        if HAS_MASK:
            for first in range(0, count, BLOCK_N):
                tokens, inside = stretch_tokens(first + columns, count, k_first)
                kept = load_allowed(key_mask, tokens, inside, mask_strides[1], HAS_MASK)
                peak, moments = guarded_tile(
                    peak, moments, q_tile, k, table, tokens, kept[None, :], dims, k_strides, scale, D, PRECISION
                )
        else:
            bulk = count // BLOCK_N * BLOCK_N
            if bulk > 0:
                # Full tiles of an open frame: nothing to mask. The product of a tile is under way on the tensor cores
                # while the softmax of the tile before it takes its exponentials.
                k_next = k + wide(k_first) * k_strides[2]
                table_next = table + k_first * COORDINATE_LANES
                scores = full_scores(q_tile, k_next, columns, dims, k_strides, kept_rows, D, PRECISION)
                for first in range(BLOCK_N, bulk, BLOCK_N):
                    ahead = full_scores(
                        q_tile, k_next + wide(first) * k_strides[2], columns, dims, k_strides, kept_rows, D, PRECISION
                    )
                    before = table_next + (first - BLOCK_N) * COORDINATE_LANES
                    coordinates = coordinate_tile(before, columns, kept_rows, False)
                    peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
                    scores = ahead
                last = table_next + (bulk - BLOCK_N) * COORDINATE_LANES
                coordinates = coordinate_tile(last, columns, kept_rows, False)
                peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
            if bulk < count:
                places = k_first + bulk + columns
                tokens = held_tokens(places, k_first, k_stop)
                peak, moments = guarded_tile(
                    peak, moments, q_tile, k, table, tokens, (places == tokens)[None, :], dims, k_strides, scale, D,
                    PRECISION,
                )  # fmt: skip
        count = tl.cdiv(count, BLOCK_N)
    if COUNTED:
        tl.atomic_add(visited, count)
    store_displacement(
        displacement, statistics, peak, moments, scale, width, rows, kept_rows,
        wide(tl.program_id(1)) * row_count + row_place,
    )  # fmt: skip


@triton.jit
def store_displacement(displacement, statistics, peak, moments, scale, width, rows, kept_rows, first_row):
    """Writes displacement `[.., R, 2]` and log-sum-exp `[.., R]` of a finished tile; a row without keys gives 0."""
    total = lane(moments, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    # sum_p' P (p' - p): the own place is taken off before the division, so that an empty row stays 0.
    x = (lane(moments, 1) - total * (rows % width).to(tl.float32)) / divisor
    y = (lane(moments, 2) - total * (rows // width).to(tl.float32)) / divisor
    tl.store(displacement + (first_row + rows) * 2, x, mask=kept_rows)
    tl.store(displacement + (first_row + rows) * 2 + 1, y, mask=kept_rows)
    tl.store(statistics + first_row + rows, log_sum_exp(peak, total, scale), mask=kept_rows)


def soft_forward(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement and log-sum-exp of every head.

    Args:
        q: `[B, H, Nq, D]`, any strides. k: `[B, Hk, Nk, D]`, each of its heads for H / Hk heads of q.
        scale: scale * temperature * log2(e), above 0.
        key_mask: bool `[B, Nk]`; center: int32 `[B, R, 2]`; window: radius, -1 for none.
        visited: int32 `[1]` that counts the key tiles visited, for tests.

    Returns:
        float32 `[B, H, R, 2]` (dx, dy) and `[B, H, R]` base-2 log-sum-exp, +inf for a row without keys.
    """
    batch, heads, _, head_dim = q.shape
    displacement = torch.empty(batch, heads, table.rows, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, heads, table.rows, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("soft_forward_window" if window >= 0 else "soft_forward", q)
    blocks = block_count(tiles.rows, table.longest, table.height, table.width, window)
    mask = table.pairs if key_mask is None else key_mask
    launch(
        soft_forward_kernel, (len(table.pairs) * blocks, batch * heads),
        q, k, displacement, statistics, coordinate_table(table.height, table.width, q.dtype, q.device), table.pairs,
        mask, table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, heads // k.shape[1], table.rows, blocks, table.width,
        table.height, scale, window,
        D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        HAS_MASK=key_mask is not None, WINDOW=window_kind(window, center), PARTS=not table.whole,
        COUNTED=visited is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics
