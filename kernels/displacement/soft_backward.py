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

from corrdit.kernels.displacement.gradient_rows import gradient_rows, load_gradient_rows, logit_gradients
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch
from corrdit.kernels.shared.primitives import (
    COORDINATE_LANES,
    all_defined,
    coordinate_tile,
    held_frame,
    key_frame,
    load_allowed,
    load_tile,
    multiply,
    product,
    query_frame,
    store_tile,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.kernels.shared.windows import (
    block_count,
    block_tokens,
    extent,
    held_tokens,
    in_window,
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
def guarded_keys(
    accumulator, q_tile, k, table, row_planes, shift, tokens, kept, seen, dims, k_strides, scale, D: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[M, D]` with what a tile of keys adds, all of which are there to be read, and some not `seen [M or 1, N]`."""
    # Removed keys read as 0, or a NaN in one of them would reach every query.
    k_tile = load_tile(k, tokens, dims, k_strides, kept, GUARD, D)  # [N, D]
    coordinates = coordinate_tile(table, tokens, tokens, False)
    scores = tl.where(seen, product(q_tile, tl.trans(k_tile), PRECISION), float("-inf"))
    dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
    return multiply(dlogit.to(k_tile.dtype), k_tile, accumulator, PRECISION)


@triton.jit
def soft_backward_query_kernel(
    q, k, dq, planes, shifts, ranges, table, pairs, frames, starts, order, key_mask, center,
    q_strides, k_strides, dq_strides, mask_strides, heads, group, row_count, tiles, width, height, scale, logit_scale,
    radius, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame, batch * head): dq of its rows, summed over the frame's pairs."""
    frame = tl.program_id(0) // tiles
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_place, q_first, q_stop = held_frame(frames, frame)
    rows, kept_rows = block_tokens(tl.program_id(0) % tiles, q_first, q_stop, width, BLOCK_M, WINDOW)
    some_row = q_first + tl.program_id(0) % tiles * BLOCK_M < q_stop
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1] + q_place * q_strides[2]
    dq += wide(batch) * dq_strides[0] + wide(head) * dq_strides[1] + q_place * dq_strides[2]
    k += wide(batch) * k_strides[0] + wide(head // group) * k_strides[1]
    key_mask += wide(batch) * mask_strides[0]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    gradient_range = tl.load(ranges + tl.program_id(1) // group)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    codes = tile_codes(BLOCK_N)
    for index in range(tl.load(starts + frame), tl.load(starts + frame + 1)):
        pair = tl.load(order + index)
        k_place, k_first, k_stop = key_frame(pairs, pair)
        row_place = wide(tl.load(pairs + 8 * pair + 6))
        k_frame = k + k_place * k_strides[2]
        mask_frame = key_mask + k_place * mask_strides[1]
        first_row = wide(tl.program_id(1)) * row_count + row_place
        row_planes, shift = load_gradient_rows(planes, shifts, first_row, rows, kept_rows, True)
        if WINDOW > 0:
            center_x, center_y = load_centers(
                center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW
            )
            left, top, across, count = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
            count = tl.where(k_first < k_stop, count, 0)
            lowest, highest = window_bounds(center_x, center_y, radius, width, height)
            inverse = reciprocal(across)
            for turn in range(0, count):
                x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
                places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
                tokens = held_tokens(places, k_first, k_stop)
                kept = load_allowed(mask_frame, tokens, places == tokens, mask_strides[1], HAS_MASK)
                seen = seen_keys(codes, kept, lowest - corner, highest - corner, HAS_MASK or PARTS)
                accumulator = guarded_keys(
                    accumulator, q_tile, k_frame, table, row_planes, shift, tokens, kept, seen, dims, k_strides, scale,
                    D, False, PRECISION,
                )  # fmt: skip
        else:
            count = tl.where(some_row, k_stop - k_first, 0)
            bulk = count // BLOCK_N * BLOCK_N
            if HAS_MASK:
                for first in range(0, count, BLOCK_N):
                    tokens, inside = stretch_tokens(first + columns, count, k_first)
                    kept = load_allowed(mask_frame, tokens, inside, mask_strides[1], HAS_MASK)
                    accumulator = guarded_keys(
                        accumulator, q_tile, k_frame, table, row_planes, shift, tokens, kept, kept[None, :], dims,
                        k_strides, scale, D, HAS_MASK, PRECISION,
                    )  # fmt: skip
            else:
                # Full tiles of an open frame: nothing to mask, and pointers that step on cost fewer instructions than
                # places worked out anew.
                k_next = k_frame + wide(k_first) * k_strides[2]
                table_next = table + k_first * COORDINATE_LANES
                for _ in range(0, bulk, BLOCK_N):
                    k_tile = load_tile(k_next, columns, dims, k_strides, kept_rows, False, D)  # [N, D]
                    coordinates = coordinate_tile(table_next, columns, kept_rows, False)
                    scores = product(q_tile, tl.trans(k_tile), PRECISION)
                    dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
                    accumulator = multiply(dlogit.to(k_tile.dtype), k_tile, accumulator, PRECISION)
                    k_next += wide(k_strides[2]) * BLOCK_N
                    table_next += BLOCK_N * COORDINATE_LANES
                if bulk < count:
                    places = k_first + bulk + columns
                    tokens = held_tokens(places, k_first, k_stop)
                    kept = places == tokens
                    accumulator = guarded_keys(
                        accumulator, q_tile, k_frame, table, row_planes, shift, tokens, kept, kept[None, :], dims,
                        k_strides, scale, D, HAS_MASK, PRECISION,
                    )  # fmt: skip
    store_tile(dq, accumulator * (logit_scale * gradient_range), rows, dims, dq_strides, kept_rows, D)


@triton.jit
def guarded_queries(
    accumulator, k_tile, coordinates, q, planes, shifts, pair_row, tokens, seen, dims, q_strides, scale,
    D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk `[N, D]` with what a tile of queries adds, all there to be read, and some not `seen [N or 1, M]`."""
    q_tile = load_tile(q, tokens, dims, q_strides, tokens, False, D)  # [M, D]
    row_planes, shift = load_gradient_rows(planes, shifts, pair_row, tokens, tokens, False)
    scores = product(k_tile, tl.trans(q_tile), PRECISION)
    dlogit = logit_gradients(scores, scale, shift[None, :], coordinates, row_planes, PRECISION)
    # An undefined query reaches the keys that see it alone.
    dlogit = tl.where(seen, dlogit, 0.0)
    return multiply(dlogit.to(q_tile.dtype), q_tile, accumulator, PRECISION)


@triton.jit
def soft_backward_key_kernel(
    q, k, dk, planes, shifts, ranges, table, pairs, frames, starts, order, key_mask, center,
    q_strides, k_strides, dk_strides, mask_strides, heads, group, row_count, tiles, width, height, scale, logit_scale,
    radius, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys of one frame, batch * key head): dk of its keys, summed over the frame's pairs and the
    `group` heads of q that read them."""
    frame = tl.program_id(0) // tiles
    key_heads = heads // group
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    k_place, k_first, k_stop = held_frame(frames, frame)
    keys, inside = block_tokens(tl.program_id(0) % tiles, k_first, k_stop, width, BLOCK_N, WINDOW)
    some_key = k_first + tl.program_id(0) % tiles * BLOCK_N < k_stop
    dims = tl.arange(0, BLOCK_D)
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0] + wide(key_head) * k_strides[1] + k_place * k_strides[2]
    dk += wide(batch) * dk_strides[0] + wide(key_head) * dk_strides[1] + k_place * dk_strides[2]
    key_mask += wide(batch) * mask_strides[0] + k_place * mask_strides[1]
    kept = load_allowed(key_mask, keys, inside, mask_strides[1], HAS_MASK)
    k_tile = load_tile(k, keys, dims, k_strides, kept, True, D)  # [N, D]
    coordinates = coordinate_tile(table, keys, inside, True)  # [N, 16]
    queries = tl.arange(0, BLOCK_M)
    gradient_range = tl.load(ranges + tl.program_id(1))
    accumulator = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    key_x, key_y = keys % width, keys // width
    codes = tile_codes(BLOCK_M)
    if WINDOW == 1:
        # A query in its own window reaches a key exactly where the key's window reaches the query.
        left, top, across, steps = window_tiles(key_x, key_y, inside, radius, width, height, BLOCK_M)
        lowest, highest = window_bounds(key_x, key_y, radius, width, height)
    elif WINDOW == 2:
        left, top, across, steps = window_tiles(key_x, key_y, inside, width + height, width, height, BLOCK_M)
        lowest, highest = window_bounds(key_x, key_y, width + height, width, height)
    first_pair, pair_count = tl.load(starts + frame), tl.load(starts + frame + 1) - tl.load(starts + frame)
    for turn in range(0, pair_count * group):
        pair = tl.load(order + first_pair + turn // group)
        head = key_head * group + turn % group
        q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
        pair_row = (wide(batch) * heads + head) * row_count + row_place
        q_frame = q + wide(head) * q_strides[1] + q_place * q_strides[2]
        if WINDOW > 0:
            inverse = reciprocal(across)
            for step in range(0, tl.where(q_first < q_stop, steps, 0)):
                x, y = tile_corner(step, left, top, across, inverse, BLOCK_M)
                places, corner = tile_tokens(x, y, width, BLOCK_M), place_code(x, y)
                tokens = held_tokens(places, q_first, q_stop)
                seen = seen_keys(codes, places == tokens, lowest - corner, highest - corner, PARTS)
                reached = steps > 0
                if WINDOW == 2:
                    center_row = wide(batch) * row_count + row_place
                    center_x, center_y = load_centers(center, center_row, tokens, tokens >= 0, width, WINDOW)
                    reached = reaches(center_x, key_x, inside, radius) & reaches(center_y, key_y, inside, radius)
                    first_seen, last_seen = window_bounds(center_x, center_y, radius, width, height)
                    seen = seen & in_window(place_code(key_x, key_y)[:, None], first_seen[None, :], last_seen[None, :])
                if reached:
                    accumulator = guarded_queries(
                        accumulator, k_tile, coordinates, q_frame, planes, shifts, pair_row, tokens, seen, dims,
                        q_strides, scale, D, PRECISION,
                    )  # fmt: skip
        else:
            count = tl.where(some_key, q_stop - q_first, 0)
            bulk = count // BLOCK_M * BLOCK_M
            q_next, row_next = q_frame + wide(q_first) * q_strides[2], pair_row + q_first
            for _ in range(0, bulk, BLOCK_M):
                q_tile = load_tile(q_next, queries, dims, q_strides, inside, False, D)  # [M, D]
                row_planes, shift = load_gradient_rows(planes, shifts, row_next, queries, inside, False)
                scores = product(k_tile, tl.trans(q_tile), PRECISION)
                dlogit = logit_gradients(scores, scale, shift[None, :], coordinates, row_planes, PRECISION)
                accumulator = multiply(dlogit.to(q_tile.dtype), q_tile, accumulator, PRECISION)
                q_next += wide(q_strides[2]) * BLOCK_M
                row_next += BLOCK_M
            if bulk < count:
                places = q_first + bulk + queries
                tokens = held_tokens(places, q_first, q_stop)
                accumulator = guarded_queries(
                    accumulator, k_tile, coordinates, q_frame, planes, shifts, pair_row, tokens,
                    (places == tokens)[None, :], dims, q_strides, scale, D, PRECISION,
                )  # fmt: skip
    if WINDOW > 0:
        # An undefined key has its scores, and no gradient: see `corrdit.reference.scores`.
        kept = kept & all_defined(k_tile)
    scaled = tl.where(kept[:, None], accumulator * (logit_scale * gradient_range), 0.0)
    store_tile(dk, scaled, keys, dims, dk_strides, inside, D)


@triton.jit
def reaches(centers, keys, inside, radius):
    """Whether any window round the centres may reach any of the keys, along one axis."""
    lowest, highest = tl.min(centers, 0), tl.max(centers, 0)
    lowest_key, highest_key = extent(keys, inside)
    return (lowest - radius <= highest_key) & (highest + radius >= lowest_key)


def where_defined(tensor: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """`[B, H, N, D]` with 0 for tokens that hold NaN or infinity, or that a mask `[B, N]` removes.

    In a product of a tile such a token would reach those whose windows it lies outside of; the others have it from
    their softmax, whose log-sum-exp is undefined then.
    """
    kept = tensor.isfinite().all(-1, keepdim=True)
    if key_mask is not None:
        kept = kept & key_mask[:, None, :, None]
    return tensor.masked_fill(~kept, 0.0)


def soft_backward(
    gradient: Tensor | None,
    grad_level: Tensor | None,
    q: Tensor,
    k: Tensor,
    displacement: Tensor,
    statistics: Tensor,
    table: FramePairTable,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk) in the shapes and dtype of q and k, of those that are `wanted`.

    Args:
        gradient: float32 `[B, H, R, 2]` with respect to `displacement`; grad_level: `[B, H, R]` to `statistics`.
        displacement, statistics: what `soft_forward` gave.
        table, scale, key_mask, center, window: as in `soft_forward`.
    """
    batch, heads, _, head_dim = q.shape
    group = heads // k.shape[1]
    coordinates = coordinate_table(table.height, table.width, q.dtype, q.device)
    planes, shifts, ranges = gradient_rows(
        gradient, grad_level, displacement, statistics, coordinates.dtype, table, group
    )
    mask = table.pairs if key_mask is None else key_mask
    gradients: list[Tensor | None] = [None, None]
    for index, (name, kernel, like, frames, starts, order) in enumerate((
        ("soft_backward_query", soft_backward_query_kernel, q, table.queries, table.query_starts, table.query_order),
        ("soft_backward_key", soft_backward_key_kernel, k, table.keys, table.key_starts, table.key_order),
    )):  # fmt: skip
        if not wanted[index]:
            continue
        of_query = kernel is soft_backward_query_kernel
        if window >= 0:
            queries, keys = (q, where_defined(k, key_mask)) if of_query else (where_defined(q), k)
        else:
            queries, keys = q, k
        output = torch.empty(like.shape, dtype=q.dtype, device=q.device)
        tiles = choose_tiles(f"{name}_window" if window >= 0 else name, q, key_mask is not None)
        size = tiles.rows if of_query else tiles.columns
        blocks = block_count(size, table.longest, table.height, table.width, window)
        launch(
            kernel, (table.frames * blocks, batch * like.shape[1]),
            queries, keys, output, planes, shifts, ranges, coordinates, table.pairs, frames, starts, order, mask,
            table.pairs if center is None else center,
            queries.stride(), keys.stride(), output.stride(), mask.stride(), heads, group, table.rows, blocks,
            table.width, table.height, scale, scale / LOG2_E, window,
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            HAS_MASK=key_mask is not None, WINDOW=window_kind(window, center), PARTS=not table.whole,
            PRECISION=product_precision(), tiles=tiles,
        )  # fmt: skip
        gradients[index] = output
    return gradients[0], gradients[1]
