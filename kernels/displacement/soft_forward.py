"""Soft displacement of each head by itself: the forward kernel and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    accumulate_moments,
    coordinate_tile,
    keep_window,
    lane,
    load_allowed,
    load_tile,
    log_sum_exp,
    product,
    wide,
    window_rows,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.problem import product_precision

OWN_PLACE = 1
GIVEN_CENTER = 2


@triton.jit
def load_centers(center, first, rows, kept, width, WINDOW: tl.constexpr):
    """Centre (x, y) of the window of each query `[M]`: its own place, or what `center [.., S, 2]` says."""
    if WINDOW == 2:
        pointers = center + (first + rows) * 2
        return tl.load(pointers, mask=kept, other=0), tl.load(pointers + 1, mask=kept, other=0)
    else:
        return rows % width, rows // width


@triton.jit
def key_range(center_y, kept, radius, width, frame_tokens, WINDOW: tl.constexpr):
    """(first, end) of the key tokens a query tile has to visit."""
    if WINDOW > 0:
        first, end = window_rows(center_y, kept, radius, frame_tokens // width)
        return first * width, end * width
    else:
        return frame_tokens * 0, frame_tokens


@triton.jit
def masked_scores(
    scores, tokens, inside, key_mask, mask_stride, center_x, center_y, radius, width,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`[M, N]` scores, -inf for keys past the end of the frame, removed by the mask, or outside the window."""
    kept = load_allowed(key_mask, tokens, inside, mask_stride, HAS_MASK)
    if WINDOW > 0:
        scores = keep_window(
            scores, (tokens % width)[None, :], (tokens // width)[None, :], center_x[:, None], center_y[:, None], radius
        )
    return tl.where(kept[None, :], scores, float("-inf"))


@triton.jit
def guarded_tile(
    peak, moments, q_tile, k, table, first, end, dims, k_strides, key_mask, mask_stride, center_x, center_y, radius,
    width, scale, BLOCK_N: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys from `first` on, of which some are past the end, removed or outside the window."""
    columns = tl.arange(0, BLOCK_N)
    inside = first + columns < end
    k_tile = load_tile(k + wide(first) * k_strides[2], columns, dims, k_strides, inside, True, D)  # [N, D]
    coordinates = coordinate_tile(table + first * 16, columns, inside, True)
    scores = product(q_tile, tl.trans(k_tile), PRECISION)
    scores = masked_scores(
        scores, first + columns, inside, key_mask, mask_stride, center_x, center_y, radius, width, HAS_MASK, WINDOW
    )
    return accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)


@triton.jit
def full_scores(q_tile, k, columns, dims, k_strides, unused, D: tl.constexpr, PRECISION: tl.constexpr):
    """`[M, N]` scores of the keys from `k` on, all of them inside."""
    k_tile = load_tile(k, columns, dims, k_strides, unused, False, D)  # [N, D]
    return product(q_tile, tl.trans(k_tile), PRECISION)


@triton.jit
def soft_forward_kernel(
    q, k, displacement, statistics, table, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, pair_count, frame_tokens, width, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch * head): displacement and base-2 log-sum-exp of its rows."""
    tiles = tl.cdiv(frame_tokens, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < frame_tokens
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1]
    q += wide(tl.load(pairs + 2 * pair)) * frame_tokens * q_strides[2]
    key_frame = wide(tl.load(pairs + 2 * pair + 1))
    k += key_frame * frame_tokens * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + key_frame * frame_tokens * mask_strides[1]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]

    first_row = (wide(batch) * pair_count + pair) * frame_tokens
    center_x, center_y = load_centers(center, first_row, rows, kept_rows, width, WINDOW)
    start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    if HAS_MASK or WINDOW > 0:
        for first in range(start, end, BLOCK_N):
            peak, moments = guarded_tile(
                peak, moments, q_tile, k, table, first, end, dims, k_strides, key_mask, mask_strides[1], center_x,
                center_y, radius, width, scale, BLOCK_N, D, HAS_MASK, WINDOW, PRECISION,
            )  # fmt: skip
    else:
        bulk = frame_tokens // BLOCK_N * BLOCK_N
        if bulk > 0:
            # Full tiles of an open frame: nothing to mask. The product of a tile is under way on the tensor cores while
            # the softmax of the tile before it takes its exponentials.
            scores = full_scores(q_tile, k, columns, dims, k_strides, kept_rows, D, PRECISION)
            for first in range(BLOCK_N, bulk, BLOCK_N):
                ahead = full_scores(q_tile, k + wide(first) * k_strides[2], columns, dims, k_strides, kept_rows, D,
                                    PRECISION)  # fmt: skip
                coordinates = coordinate_tile(table + (first - BLOCK_N) * 16, columns, kept_rows, False)
                peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
                scores = ahead
            coordinates = coordinate_tile(table + (bulk - BLOCK_N) * 16, columns, kept_rows, False)
            peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
        if bulk < frame_tokens:
            peak, moments = guarded_tile(
                peak, moments, q_tile, k, table, bulk, end, dims, k_strides, key_mask, mask_strides[1], center_x,
                center_y, radius, width, scale, BLOCK_N, D, HAS_MASK, WINDOW, PRECISION,
            )  # fmt: skip
    if COUNTED:
        tl.atomic_add(visited, tl.cdiv(end - start, BLOCK_N))
    store_displacement(
        displacement, statistics, peak, moments, scale, width, rows, kept_rows,
        (wide(tl.program_id(1)) * pair_count + pair) * frame_tokens,
    )  # fmt: skip


@triton.jit
def store_displacement(displacement, statistics, peak, moments, scale, width, rows, kept_rows, first_row):
    """Writes displacement `[.., S, 2]` and log-sum-exp `[.., S]` of a finished tile; a row without keys gives 0."""
    total = lane(moments, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    # sum_p' P (p' - p): the own place is taken off before the division, so that an empty row stays 0.
    x = (lane(moments, 1) - total * (rows % width).to(tl.float32)) / divisor
    y = (lane(moments, 2) - total * (rows // width).to(tl.float32)) / divisor
    tl.store(displacement + (first_row + rows) * 2, x, mask=kept_rows)
    tl.store(displacement + (first_row + rows) * 2 + 1, y, mask=kept_rows)
    tl.store(statistics + first_row + rows, log_sum_exp(peak, total, scale), mask=kept_rows)


def window_kind(window: int, center: Tensor | None) -> int:
    """0 without a window, else where it lies."""
    if window < 0:
        return 0
    return OWN_PLACE if center is None else GIVEN_CENTER


def soft_forward(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    height: int,
    width: int,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement and log-sum-exp of every head.

    Args:
        q, k: `[B, H, F*S, D]`, any strides.
        scale: scale * temperature * log2(e), above 0.
        key_mask: bool `[B, F*S]`; center: int32 `[B, P, S, 2]`; window: radius, -1 for none.
        visited: int32 `[1]` that counts the key tiles visited, for tests.

    Returns:
        float32 `[B, H, P, S, 2]` (dx, dy) and `[B, H, P, S]` base-2 log-sum-exp, +inf for a row without keys.
    """
    batch, heads, _, head_dim = q.shape
    frame_tokens, pair_count = height * width, table.pairs.shape[0]
    displacement = torch.empty(batch, heads, pair_count, frame_tokens, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, heads, pair_count, frame_tokens, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("soft_forward", q)
    mask = table.pairs if key_mask is None else key_mask
    launch(
        soft_forward_kernel, (pair_count * tile_count(frame_tokens, tiles.rows), batch * heads),
        q, k, displacement, statistics, coordinate_table(height, width, q.dtype, q.device), table.pairs, mask,
        table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, pair_count, frame_tokens, width, scale, window,
        D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        HAS_MASK=key_mask is not None, WINDOW=window_kind(window, center), COUNTED=visited is not None,
        PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics
