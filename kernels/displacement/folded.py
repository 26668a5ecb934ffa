"""Soft displacement of logits averaged over heads: one product over the folded axis H * D.

The mean over heads of q_h.k_h is concat(q).concat(k) / H, so the forward kernel walks heads and dims by their strides
and never copies. `folded_backward` has the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_forward import store_displacement
from corrdit.kernels.shared.configs import Tiles
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
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
def frame_rows(pairs, order, first, last, places):
    """Of the rows `places [M]` of a run of pairs: their token in the frame, and place of the results of token 0.

    Args:
        first, last: the run's entries of `order`; see `FramePairTable.query_runs`.
    """
    entry = tl.zeros_like(places) + first
    size = last - first
    while size > 1:
        middle = entry + size // 2
        entry = tl.where(tl.load(pairs + 8 * tl.load(order + middle) + 7) <= places, middle, entry)
        size -= size // 2
    pair = pairs + 8 * tl.load(order + entry)
    return tl.load(pair + 1) + places - tl.load(pair + 7), wide(tl.load(pair + 6))


@triton.jit
def add_keys(
    peak, moments, q, k, q_rows, kept_rows, tokens, inside, codes, lowest, highest, table, key_mask,
    mask_stride, q_strides, k_strides, group, heads, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys; in place of those that are not `inside`, `tokens` has some that k holds.

    Args:
        codes, lowest, highest: as in `seen_keys`, read with a window alone.
    """
    scores = head_scores(
        q, k, q_rows, tokens, kept_rows, kept_rows, q_strides, k_strides, 1, group, 0, heads,
        D, BLOCK_D, False, PRECISION,
    )  # fmt: skip
    kept = load_allowed(key_mask, tokens, inside, mask_stride, HAS_MASK)
    if WINDOW > 0:
        seen = seen_keys(codes, kept, lowest, highest, HAS_MASK or PARTS)
    else:
        seen = kept[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    return accumulate_moments(peak, moments, scores, scale, coordinate_tile(table, tokens, tokens, False), PRECISION)


@triton.jit
def add_stretch(
    peak, moments, q, k, q_rows, kept_rows, start, stop, count, k_first, table, key_mask, mask_stride,
    q_strides, k_strides, group, heads, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys `start` to `stop` of the `count` that k holds of the frame, without a window."""
    columns = tl.arange(0, BLOCK_N)
    for first in range(start, stop, BLOCK_N):
        tokens, inside = stretch_tokens(first + columns, count, k_first)
        peak, moments = add_keys(
            peak, moments, q, k, q_rows, kept_rows, tokens, inside, 0, 0, 0, table, key_mask, mask_stride,
            q_strides, k_strides, group, heads, scale, D, BLOCK_D, HAS_MASK, 0, False, PRECISION,
        )  # fmt: skip
    return peak, moments


@triton.jit
def folded_forward_kernel(
    q, k, common, displacement, statistics, table, pairs, runs, order, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, group, row_count, parts, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Displacement and base-2 log-sum-exp of a tile of query rows.

    Program (tile of rows of a run, run; batch), see `FramePairTable.query_runs`: a tile holds rows of several query
    frames, for all see the same keys. With a window it is (frame pair, tile of its rows; batch).

    Args:
        common: see `weighted_queries`, read if WEIGHTED. parts: runs, or with a window tiles of a pair.
    """
    batch = tl.program_id(1)
    if WINDOW > 0:
        tile = tl.program_id(0) % parts
        q_place, q_first, q_stop, row_place = query_frame(pairs, tl.program_id(0) // parts)
        k_place, k_first, k_stop = key_frame(pairs, tl.program_id(0) // parts)
        rows, kept_rows = block_tokens(tile, q_first, q_stop, width, BLOCK_M, WINDOW)
    else:
        # Programs that run together have all key frames and few queries, which stay in the L2 cache.
        run = runs + 8 * (tl.program_id(0) % parts)
        k_place, k_first, k_stop = wide(tl.load(run + 4)), tl.load(run + 5), tl.load(run + 6)
        rows = tl.program_id(0) // parts * BLOCK_M + tl.arange(0, BLOCK_M)
        kept_rows = rows < tl.load(run + 1)
        q_place, q_first = wide(tl.load(run)), 0
    # Rows past the end repeat the first one and are not stored, which saves the products their masks.
    q_rows = tl.where(kept_rows, rows, q_first)
    q += wide(batch) * q_strides[0] + q_place * q_strides[2]
    k += wide(batch) * k_strides[0] + k_place * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + k_place * mask_strides[1]
    scale = weighted_scale(scale, common, WEIGHTED)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    if WINDOW > 0:
        center_x, center_y = load_centers(center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW)
        lowest, highest = window_bounds(center_x, center_y, radius, width, height)
        left, top, across, turns = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
        turns = tl.where(k_first < k_stop, turns, 0)
        inverse = reciprocal(across)
        codes = tile_codes(BLOCK_N)
        for turn in range(0, turns):
            x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
            places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
            tokens = held_tokens(places, k_first, k_stop)
            peak, moments = add_keys(
                peak, moments, q, k, q_rows, kept_rows, tokens, places == tokens, codes, lowest - corner,
                highest - corner, table, key_mask, mask_strides[1], q_strides, k_strides, group, heads, scale, D,
                BLOCK_D, HAS_MASK, WINDOW, PARTS, PRECISION,
            )  # fmt: skip
    else:
        count = tl.where(tl.program_id(0) // parts * BLOCK_M < tl.load(run + 1), k_stop - k_first, 0)
        turns = tl.cdiv(count, BLOCK_N)
        # Half a tile does for the last keys where it holds them.
        TAIL: tl.constexpr = BLOCK_N // 2 if BLOCK_N > 16 else 16
        ragged = count % BLOCK_N
        bulk = count - tl.where(ragged <= TAIL, ragged, 0)
        peak, moments = add_stretch(
            peak, moments, q, k, q_rows, kept_rows, 0, bulk, count, k_first, table, key_mask, mask_strides[1],
            q_strides, k_strides, group, heads, scale, D, BLOCK_D, BLOCK_N, HAS_MASK, PRECISION,
        )  # fmt: skip
        peak, moments = add_stretch(
            peak, moments, q, k, q_rows, kept_rows, bulk, count, count, k_first, table, key_mask, mask_strides[1],
            q_strides, k_strides, group, heads, scale, D, BLOCK_D, TAIL, HAS_MASK, PRECISION,
        )  # fmt: skip
    if COUNTED:
        tl.atomic_add(visited, turns)
    if WINDOW == 0:
        rows, row_place = frame_rows(pairs, order, tl.load(run + 2), tl.load(run + 3), q_rows)
    store_displacement(
        displacement, statistics, peak, moments, scale, width, rows, kept_rows, wide(batch) * row_count + row_place
    )


def visited_scores(queries: int, keys: int, tiles: Tiles) -> int:
    """Scores in the tiles of a run of so many queries against the keys of one frame, without a window."""
    ragged, half = keys % tiles.columns, max(16, tiles.columns // 2)
    last = 0 if ragged == 0 else half if ragged <= half else tiles.columns
    return tile_count(queries, tiles.rows) * tiles.rows * (keys - ragged + last)


class Weighted(NamedTuple):
    """Queries whose logits averaged over heads are the weighted ones.

    Attributes:
        q: each head times its factor, in its own dtype; the queries as they are without weights.
        factors: float32 `[H]` weights over the largest, which cannot leave the range of float16; None without weights.
        common: float32 `[1]` H times the largest, a factor of the exponent; None without weights.
    """

    q: Tensor
    factors: Tensor | None = None
    common: Tensor | None = None


def weighted_queries(q: Tensor, weights: Tensor | None) -> Weighted:
    """Queries `[B, H, N, D]` times the weights `[H]` of their heads: once, not in every tile that is read again."""
    if weights is None:
        return Weighted(q)
    weights = weights.to(torch.float32)
    largest = weights.amax()
    factors = weights / largest
    scaled = torch.mul(q, factors[:, None, None], out=torch.empty_like(q))
    return Weighted(scaled, factors, (largest * len(weights)).reshape(1))


def folded_forward(
    q: Tensor,
    k: Tensor,
    common: Tensor | None,
    table: FramePairTable,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement and log-sum-exp of the logits averaged over heads.

    Args:
        q, common: as in `Weighted`. The rest as in `soft_forward`.

    Returns:
        float32 `[B, 1, R, 2]` and `[B, 1, R]`.
    """
    batch, heads, _, head_dim = q.shape
    displacement = torch.empty(batch, 1, table.rows, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, 1, table.rows, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("folded_forward_window" if window >= 0 else "folded_forward", q)
    if window >= 0:
        parts = block_count(tiles.rows, table.longest, table.height, table.width, window)
        programs = len(table.pairs) * parts
    else:
        parts = len(table.query_runs)
        programs = tile_count(table.longest_run, tiles.rows) * parts
    mask = table.pairs if key_mask is None else key_mask
    launch(
        folded_forward_kernel, (programs, batch),
        q, k, table.pairs if common is None else common, displacement, statistics,
        coordinate_table(table.height, table.width, q.dtype, q.device), table.pairs,
        table.query_runs, table.key_order, mask,
        table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, heads // k.shape[1], table.rows, parts, table.width,
        table.height, scale / heads, window,
        D=head_dim, BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), PARTS=not table.whole, WEIGHTED=common is not None,
        COUNTED=visited is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics
