"""Gradients of the soft displacement of each head: one kernel for dq, one for dk, neither with atomics.

With P recomputed from the saved log-sum-exp, g the incoming gradient and e the expected position,
`dlogit[p, p'] = P[p, p'] * (g . (p' - e))`, times scale * temperature. g . (p' - e) is a matrix product of
(-g.e, g_x, g_y) with (1, x', y'), and the size of a row's g goes into the exponent of P. Both kernels walk their frame
pairs and tiles in a fixed order, so the result does not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_forward import key_range, load_centers, masked_scores, window_kind
from corrdit.kernels.shared.configs import Tiles, padded_head_dim
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    COORDINATE_LANES,
    GRADIENT_LANES,
    coordinate_tile,
    exponentials,
    gradient_planes,
    gradient_shift,
    keep_window,
    load_allowed,
    load_tile,
    multiply,
    product,
    store_tile,
    wide,
    window_rows,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.problem import product_precision

# Element by element: one size does for every device.
_GRADIENT_ROWS = Tiles(256, 16, 16, 4, 1)


@triton.jit
def gradient_rows_kernel(
    gradient, displacement, statistics, ranges, planes, shifts, rows_of_head, frame_tokens, width, BLOCK: tl.constexpr
):
    """Program (block of rows, batch * head): gradient planes `[.., 8]` and shift of each row of `[B, H, P, S]`."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = local < rows_of_head
    rows = wide(tl.program_id(1)) * rows_of_head + local
    token = local % frame_tokens
    grad_x = tl.load(gradient + rows * 2, mask=kept, other=0.0)
    grad_y = tl.load(gradient + rows * 2 + 1, mask=kept, other=0.0)
    mean_x = tl.load(displacement + rows * 2, mask=kept, other=0.0) + (token % width).to(tl.float32)
    mean_y = tl.load(displacement + rows * 2 + 1, mask=kept, other=0.0) + (token // width).to(tl.float32)
    tile, norm = gradient_planes(grad_x, grad_y, mean_x, mean_y)
    lanes = tl.arange(0, GRADIENT_LANES)
    places = planes + rows[:, None] * GRADIENT_LANES + lanes[None, :]
    tl.store(places, tile.to(planes.dtype.element_ty), mask=kept[:, None])
    statistics_rows = tl.load(statistics + rows, mask=kept, other=0.0)
    shift = gradient_shift(statistics_rows, norm, tl.load(ranges + tl.program_id(1)))
    tl.store(shifts + rows, shift, mask=kept)


@triton.jit
def load_gradient_rows(planes, shifts, first_row, rows, kept_rows, GUARD: tl.constexpr):
    """(gradient planes `[M, 16]`, shift `[M]` of the exponent) of a tile of query rows of one frame pair."""
    lanes = tl.arange(0, COORDINATE_LANES)
    places = planes + first_row * GRADIENT_LANES + rows[:, None] * GRADIENT_LANES + lanes[None, :]
    real = (lanes < GRADIENT_LANES)[None, :]
    if GUARD:
        tile = tl.load(places, mask=kept_rows[:, None] & real, other=0.0)
        return tile, tl.load(shifts + first_row + rows, mask=kept_rows, other=float("inf"))
    else:
        return tl.load(places, mask=real, other=0.0), tl.load(shifts + first_row + rows)


@triton.jit
def logit_gradients(scores, scale, shift, left, right, PRECISION: tl.constexpr):
    """dlogit relative to the largest gradient: the softmax weights times g.(p' - e).

    Args:
        scores: `[M, N]` with shift `[M, 1]`, gradient planes `left [M, 16]` and coordinates `right [N, 16]`; or all
            transposed, `[N, M]` with `[1, M]`, coordinates `left` and planes `right`.
    """
    towards = product(left, tl.trans(right), PRECISION)
    return exponentials(scores, scale, shift) * towards


@triton.jit
def guarded_keys(
    accumulator, q_tile, k, table, row_planes, shift, key_frame, first, end, dims, k_strides, key_mask, mask_stride,
    center_x, center_y, radius, width, scale, BLOCK_N: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[M, D]` with what a tile of keys from `first` on adds, of which some are past the end, removed or too far."""
    columns = tl.arange(0, BLOCK_N)
    inside = first + columns < end
    # Removed keys read as 0, or a NaN in one of them would reach every query.
    kept = load_allowed(key_mask, key_frame + first + columns, inside, mask_stride, HAS_MASK)
    k_tile = load_tile(k + (key_frame + first) * k_strides[2], columns, dims, k_strides, kept, True, D)  # [N, D]
    coordinates = coordinate_tile(table + first * COORDINATE_LANES, columns, inside, True)
    scores = product(q_tile, tl.trans(k_tile), PRECISION)
    scores = masked_scores(
        scores, first + columns, kept, key_mask, mask_stride, center_x, center_y, radius, width, False, WINDOW
    )
    dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
    return multiply(dlogit.to(k_tile.dtype), k_tile, accumulator, PRECISION)


@triton.jit
def soft_backward_query_kernel(
    q, k, dq, planes, shifts, ranges, table, pairs, starts, order, key_mask, center,
    q_strides, k_strides, dq_strides, mask_strides, heads, pair_count, frame_tokens, width, scale, logit_scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame, batch * head): dq of its rows, summed over the frame's pairs."""
    tiles = tl.cdiv(frame_tokens, BLOCK_M)
    frame = tl.program_id(0) // tiles
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < frame_tokens
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    offset = wide(frame) * frame_tokens
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1] + offset * q_strides[2]
    dq += wide(batch) * dq_strides[0] + wide(head) * dq_strides[1] + offset * dq_strides[2]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1]
    key_mask += wide(batch) * mask_strides[0]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    gradient_range = tl.load(ranges + tl.program_id(1))
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(tl.load(starts + frame), tl.load(starts + frame + 1)):
        pair = tl.load(order + index)
        key_frame = wide(tl.load(pairs + 2 * pair + 1)) * frame_tokens
        first_row = (wide(tl.program_id(1)) * pair_count + pair) * frame_tokens
        row_planes, shift = load_gradient_rows(planes, shifts, first_row, rows, kept_rows, True)
        center_row = (wide(batch) * pair_count + pair) * frame_tokens
        center_x, center_y = load_centers(center, center_row, rows, kept_rows, width, WINDOW)
        start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
        if HAS_MASK or WINDOW > 0:
            for first in range(start, end, BLOCK_N):
                accumulator = guarded_keys(
                    accumulator, q_tile, k, table, row_planes, shift, key_frame, first, end, dims, k_strides, key_mask,
                    mask_strides[1], center_x, center_y, radius, width, scale, BLOCK_N, D, HAS_MASK, WINDOW, PRECISION,
                )  # fmt: skip
        else:
            # Full tiles of an open frame: nothing to mask, and pointers that step on cost fewer instructions than
            # places worked out anew.
            k_first = k + key_frame * k_strides[2]
            table_first = table
            bulk = frame_tokens // BLOCK_N * BLOCK_N
            for _ in range(0, bulk, BLOCK_N):
                k_tile = load_tile(k_first, columns, dims, k_strides, kept_rows, False, D)  # [N, D]
                coordinates = coordinate_tile(table_first, columns, kept_rows, False)
                scores = product(q_tile, tl.trans(k_tile), PRECISION)
                dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
                accumulator = multiply(dlogit.to(k_tile.dtype), k_tile, accumulator, PRECISION)
                k_first += wide(k_strides[2]) * BLOCK_N
                table_first += BLOCK_N * COORDINATE_LANES
            if bulk < frame_tokens:
                accumulator = guarded_keys(
                    accumulator, q_tile, k, table, row_planes, shift, key_frame, bulk, end, dims, k_strides, key_mask,
                    mask_strides[1], center_x, center_y, radius, width, scale, BLOCK_N, D, HAS_MASK, WINDOW, PRECISION,
                )  # fmt: skip
    store_tile(dq, accumulator * (logit_scale * gradient_range), rows, dims, dq_strides, kept_rows, D)


@triton.jit
def guarded_queries(
    accumulator, k_tile, coordinates, q, planes, shifts, pair_row, first, end, keys, dims, q_strides, center_x,
    center_y, radius, width, scale, BLOCK_M: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk `[N, D]` with what a tile of queries from `first` on adds, of which some are past the end or see not all."""
    queries = tl.arange(0, BLOCK_M)
    kept_rows = first + queries < end
    q_tile = load_tile(q + wide(first) * q_strides[2], queries, dims, q_strides, kept_rows, True, D)  # [M, D]
    row_planes, shift = load_gradient_rows(planes, shifts, pair_row + first, queries, kept_rows, True)
    scores = product(k_tile, tl.trans(q_tile), PRECISION)
    if WINDOW > 0:
        x, y = (keys % width)[:, None], (keys // width)[:, None]
        scores = keep_window(scores, x, y, center_x[None, :], center_y[None, :], radius)
    dlogit = logit_gradients(scores, scale, shift[None, :], coordinates, row_planes, PRECISION)
    return multiply(dlogit.to(q_tile.dtype), q_tile, accumulator, PRECISION)


@triton.jit
def soft_backward_key_kernel(
    q, k, dk, planes, shifts, ranges, table, pairs, starts, order, key_mask, center,
    q_strides, k_strides, dk_strides, mask_strides, heads, pair_count, frame_tokens, width, scale, logit_scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys of one frame, batch * head): dk of its keys, summed over the frame's pairs."""
    tiles = tl.cdiv(frame_tokens, BLOCK_N)
    frame = tl.program_id(0) // tiles
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    keys = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < frame_tokens
    dims = tl.arange(0, BLOCK_D)
    offset = wide(frame) * frame_tokens
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1] + offset * k_strides[2]
    dk += wide(batch) * dk_strides[0] + wide(head) * dk_strides[1] + offset * dk_strides[2]
    kept = load_allowed(key_mask + wide(batch) * mask_strides[0], offset + keys, inside, mask_strides[1], HAS_MASK)
    k_tile = load_tile(k, keys, dims, k_strides, kept, True, D)  # [N, D]
    coordinates = coordinate_tile(table, keys, inside, True)  # [N, 16]
    queries = tl.arange(0, BLOCK_M)
    gradient_range = tl.load(ranges + tl.program_id(1))
    accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_key_row = tl.program_id(0) % tiles * BLOCK_N // width
    last_key_row = tl.minimum(tl.program_id(0) % tiles * BLOCK_N + BLOCK_N, frame_tokens) - 1
    last_key_row = last_key_row // width
    for index in range(tl.load(starts + frame), tl.load(starts + frame + 1)):
        pair = tl.load(order + index)
        query_frame = wide(tl.load(pairs + 2 * pair)) * frame_tokens
        pair_row = (wide(tl.program_id(1)) * pair_count + pair) * frame_tokens
        center_row = (wide(batch) * pair_count + pair) * frame_tokens
        q_first = q + query_frame * q_strides[2]
        start, end = frame_tokens * 0, frame_tokens
        if WINDOW == 1:
            # A query in its own window reaches a key exactly where the key's window reaches the query.
            start = tl.maximum(first_key_row - radius, 0) * width
            end = tl.minimum((last_key_row + radius + 1) * width, frame_tokens)
        if WINDOW > 0:
            for first in range(start, end, BLOCK_M):
                kept_rows = first + queries < end
                center_x, center_y = load_centers(center, center_row, first + queries, kept_rows, width, WINDOW)
                top, bottom = window_rows(center_y, kept_rows, radius, frame_tokens // width)
                if (top <= last_key_row) & (bottom > first_key_row):
                    accumulator = guarded_queries(
                        accumulator, k_tile, coordinates, q_first, planes, shifts, pair_row, first, end, keys, dims,
                        q_strides, center_x, center_y, radius, width, scale, BLOCK_M, D, WINDOW, PRECISION,
                    )  # fmt: skip
        else:
            bulk = frame_tokens // BLOCK_M * BLOCK_M
            q_next, row_next = q_first, pair_row
            for _ in range(0, bulk, BLOCK_M):
                q_tile = load_tile(q_next, queries, dims, q_strides, inside, False, D)  # [M, D]
                row_planes, shift = load_gradient_rows(planes, shifts, row_next, queries, inside, False)
                scores = product(k_tile, tl.trans(q_tile), PRECISION)
                dlogit = logit_gradients(scores, scale, shift[None, :], coordinates, row_planes, PRECISION)
                accumulator = multiply(dlogit.to(q_tile.dtype), q_tile, accumulator, PRECISION)
                q_next += wide(q_strides[2]) * BLOCK_M
                row_next += BLOCK_M
            if bulk < frame_tokens:
                accumulator = guarded_queries(
                    accumulator, k_tile, coordinates, q_first, planes, shifts, pair_row, bulk, end, keys, dims,
                    q_strides, keys, keys, radius, width, scale, BLOCK_M, D, WINDOW, PRECISION,
                )  # fmt: skip
    scaled = tl.where(kept[:, None], accumulator * (logit_scale * gradient_range), 0.0)
    store_tile(dk, scaled, keys, dims, dk_strides, inside, D)


def gradient_rows(
    gradient: Tensor, displacement: Tensor, statistics: Tensor, dtype: torch.dtype, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What both gradient kernels read of each row of `[B, H, P, S]`.

    Returns:
        planes `[B, H, P, S, 8]` in `dtype`, shifts float32 `[B, H, P, S]`, and ranges float32 `[B, H]`: the largest
        finite |g| of each head, 1 where all are 0.
    """
    batch, heads, pair_count, frame_tokens = statistics.shape
    largest = gradient.abs().masked_fill(~gradient.isfinite(), 0.0).flatten(2).amax(-1)
    ranges = torch.where(largest == 0, torch.ones_like(largest), largest)
    planes = torch.empty(*statistics.shape, 8, dtype=dtype, device=gradient.device)
    shifts = torch.empty_like(statistics)
    launch(
        gradient_rows_kernel, (tile_count(pair_count * frame_tokens, _GRADIENT_ROWS.rows), batch * heads),
        gradient, displacement, statistics, ranges, planes, shifts, pair_count * frame_tokens, frame_tokens, width,
        BLOCK=_GRADIENT_ROWS.rows, tiles=_GRADIENT_ROWS,
    )  # fmt: skip
    return planes, shifts, ranges


def soft_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    displacement: Tensor,
    statistics: Tensor,
    table: FramePairTable,
    height: int,
    width: int,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk) `[B, H, F*S, D]` in the dtype of q, of those that are `wanted`.

    Args:
        gradient: float32 `[B, H, P, S, 2]` with respect to `displacement`.
        displacement, statistics: what `soft_forward` gave.
        table, height, width, scale, key_mask, center, window: as in `soft_forward`.
    """
    batch, heads, _, head_dim = q.shape
    frame_tokens, pair_count = height * width, table.pairs.shape[0]
    frames = q.shape[2] // frame_tokens
    coordinates = coordinate_table(height, width, q.dtype, q.device)
    planes, shifts, ranges = gradient_rows(gradient.contiguous(), displacement, statistics, coordinates.dtype, width)
    mask = table.pairs if key_mask is None else key_mask
    gradients: list[Tensor | None] = [None, None]
    for index, (name, kernel, starts, order) in enumerate((
        ("soft_backward_query", soft_backward_query_kernel, table.query_starts, table.query_order),
        ("soft_backward_key", soft_backward_key_kernel, table.key_starts, table.key_order),
    )):  # fmt: skip
        if not wanted[index]:
            continue
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        tiles = choose_tiles(name, q, key_mask is not None or window >= 0)
        size = tiles.rows if kernel is soft_backward_query_kernel else tiles.columns
        launch(
            kernel, (frames * tile_count(frame_tokens, size), batch * heads),
            q, k, output, planes, shifts, ranges, coordinates, table.pairs, starts, order, mask,
            table.pairs if center is None else center,
            q.stride(), k.stride(), output.stride(), mask.stride(), heads, pair_count, frame_tokens, width,
            scale, scale / LOG2_E, window,
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            HAS_MASK=key_mask is not None, WINDOW=window_kind(window, center), PRECISION=product_precision(),
            tiles=tiles,
        )  # fmt: skip
        gradients[index] = output
    return gradients[0], gradients[1]
