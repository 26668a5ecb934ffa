"""Kernels for chosen query tokens: log-sum-exp over token segments, cost rows, attention mass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.matching.correspondence import Heads, cost_tile
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    exponentials,
    head_scores,
    held_frame,
    is_nan,
    load_allowed,
    load_tile,
    log_sum_exp,
    product,
    raise_peak,
    weighted_scale,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable, token_segments
from corrdit.problem import product_precision


@triton.jit
def row_statistics_kernel(
    q, k, common, statistics, tokens, segments, key_mask, q_strides, k_strides, mask_strides,
    outer, inner, group, row_count, segment_count, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    HAS_MASK: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, segment; batch * outer head): base-2 log-sum-exp of its rows over the segment's keys."""
    tiles = tl.cdiv(row_count, BLOCK_M)
    segment = tl.program_id(0) // tiles
    batch = tl.program_id(1) // outer
    head = tl.program_id(1) % outer
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < row_count
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    # Rows past the end repeat the last one, as columns do, which saves the products their masks.
    row_tokens = tl.load(tokens + tl.minimum(rows, row_count - 1))
    start = tl.load(segments + 2 * segment)
    end = start + tl.load(segments + 2 * segment + 1)
    scale = weighted_scale(scale, common, WEIGHTED)
    if not FOLDED:
        dims = tl.arange(0, BLOCK_D)
        k += wide(head // group) * k_strides[1]
        q_tile = load_tile(q + wide(head) * q_strides[1], row_tokens, dims, q_strides, kept_rows, False, D)  # [M, D]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        columns = tl.minimum(places, end - 1)
        allowed = load_allowed(key_mask, columns, places < end, mask_strides[1], HAS_MASK)
        if FOLDED:
            scores = head_scores(
                q, k, row_tokens, columns, kept_rows, allowed, q_strides, k_strides, 1, group, 0, inner, D, BLOCK_D,
                False, PRECISION,
            )  # fmt: skip
        else:
            k_tile = load_tile(k, columns, dims, k_strides, allowed, False, D)  # [N, D]
            scores = product(q_tile, tl.trans(k_tile), PRECISION)
        scores = tl.where(allowed[None, :], scores, float("-inf"))
        peak, shift, shrink = raise_peak(peak, scores, scale)
        total = total * shrink + tl.sum(exponentials(scores, scale, shift[:, None]), 1)
    places = statistics + (wide(tl.program_id(1)) * segment_count + segment) * row_count + rows
    tl.store(places, log_sum_exp(peak, total, scale), mask=kept_rows)


@triton.jit
def cost_rows_kernel(
    q, k, head_weights, forward, backward, costs, tokens, queries, keys, key_mask, q_strides, k_strides, mask_strides,
    outer, inner, group, row_count, frames, frame_tokens, source, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, HAS_MASK: tl.constexpr, PARTS: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, frame, tile of its tokens; batch * outer head): a tile of `costs [B, O, R, F, S]`."""
    column_tiles = tl.cdiv(frame_tokens, BLOCK_N)
    frame = tl.program_id(0) // column_tiles % frames
    batch = tl.program_id(1) // outer
    first_head = tl.program_id(1) % outer
    rows = tl.program_id(0) // (column_tiles * frames) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < row_count
    places = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < frame_tokens
    # Rows and columns past the end repeat the last one and are not stored, which saves the products their masks.
    source_rows, columns = tl.minimum(rows, row_count - 1), tl.minimum(places, frame_tokens - 1)
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    row_tokens = tl.load(tokens + source_rows)
    source_q, _, _ = held_frame(queries, source)
    source_k, source_first, source_stop = held_frame(keys, source)
    frame_q, _, _ = held_frame(queries, frame)
    frame_k, frame_first, frame_stop = held_frame(keys, frame)
    held_rows = (row_tokens >= source_first) & (row_tokens < source_stop)
    held_columns = (columns >= frame_first) & (columns < frame_stop)
    if FOLDED:
        head = wide(batch)
    else:
        head = wide(batch) * outer * inner + first_head
    forward_stride = wide(frames) * row_count
    backward_stride = wide(frames) * frame_tokens
    cost = cost_tile(
        q, k, head_weights, forward + head * forward_stride + wide(frame) * row_count,
        backward + head * backward_stride + wide(frame) * frame_tokens, source_q + row_tokens, frame_k + columns,
        source_k + row_tokens, frame_q + columns,
        load_allowed(key_mask, source_k + row_tokens, held_rows, mask_strides[1], HAS_MASK),
        load_allowed(key_mask, frame_k + columns, held_columns, mask_strides[1], HAS_MASK),
        source_rows, columns, forward_stride, backward_stride, q_strides, k_strides, group, first_head, inner, scale,
        D, BLOCK_D, FOLDED, BIDIRECTIONAL, HAS_MASK, PARTS, WEIGHTED, PRECISION,
    )  # fmt: skip
    row = wide(tl.program_id(1)) * row_count + rows
    stored = costs + (row * frames + frame)[:, None] * frame_tokens + places[None, :]
    tl.store(stored, cost, mask=kept_rows[:, None] & inside[None, :])


@triton.jit
def attention_mass_kernel(
    q, k, head_weights, statistics, sums, peaks, tokens, segments, key_mask, q_strides, k_strides, mask_strides,
    outer, inner, group, row_count, segment_count, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    HAS_MASK: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, segment; batch * outer head): summed and largest weight of its rows on the segment."""
    tiles = tl.cdiv(row_count, BLOCK_M)
    segment = tl.program_id(0) // tiles
    batch = tl.program_id(1) // outer
    first_head = tl.program_id(1) % outer
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < row_count
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    source_rows = tl.minimum(rows, row_count - 1)
    row_tokens = tl.load(tokens + source_rows)
    start = tl.load(segments + 2 * segment)
    end = start + tl.load(segments + 2 * segment + 1)
    if FOLDED:
        statistics += wide(batch) * row_count
    else:
        statistics += (wide(batch) * outer * inner + first_head) * row_count
    mass = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        columns = tl.minimum(places, end - 1)
        allowed = load_allowed(key_mask, columns, places < end, mask_strides[1], HAS_MASK)
        weights = cost_tile(
            q, k, head_weights, statistics, statistics, row_tokens, columns, row_tokens, columns, kept_rows, allowed,
            source_rows, columns, row_count, row_count, q_strides, k_strides, group, first_head, inner, scale, D,
            BLOCK_D, FOLDED, False, False, False, WEIGHTED, PRECISION,
        )  # fmt: skip
        # After the heads: keys that are removed, or past the end of the segment.
        weights = tl.where(allowed[None, :], weights, 0.0)
        mass += tl.sum(weights, 1)
        peak = tl.maximum(peak, tl.max(weights, 1))
    place = (wide(tl.program_id(1)) * segment_count + segment) * row_count + rows
    tl.store(sums + place, mass, mask=kept_rows)
    # Maxima pass NaN over; the sum holds it.
    tl.store(peaks + place, tl.where(is_nan(mass), mass, peak), mask=kept_rows)


def row_statistics(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    segments: Sequence[int],
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
) -> Tensor:
    """float32 `[B, H, G, R]` (`[B, 1, G, R]` for folded heads): base-2 log-sum-exp of R tokens over G segments of keys.

    Args:
        q: `[B, H, Nq, D]`, k: `[B, Hk, Nk, D]`. tokens: int64 `[R]`, places in q.
        segments: (first token, tokens) of stretches of k, flat.
        factor: turns a product into a base-2 exponent. key_mask: bool `[B, Nk]`.
    """
    outer, inner = (1, arrangement.inner) if arrangement.folded else (q.shape[1], 1)
    table = token_segments(tuple(segments), q.device)
    rows = tokens.shape[0]
    statistics = torch.empty(q.shape[0], outer, len(table), rows, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("row_statistics_folded" if arrangement.folded else "row_statistics", q)
    mask = table if key_mask is None else key_mask
    factors = arrangement.factors if arrangement.folded else None
    launch(
        row_statistics_kernel, (len(table) * tile_count(rows, tiles.rows), q.shape[0] * outer),
        q, k, table if factors is None else factors, statistics, tokens, table, mask,
        q.stride(), k.stride(), mask.stride(), outer, inner, q.shape[1] // k.shape[1], rows, len(table), factor,
        D=q.shape[-1], BLOCK_D=tiles.dims if arrangement.folded else padded_head_dim(q.shape[-1]), BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns, FOLDED=arrangement.folded, HAS_MASK=key_mask is not None,
        WEIGHTED=factors is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return statistics


def cost_of_rows(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    source: int,
    table: FramePairTable,
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
    forward: Tensor,
    backward: Tensor | None,
) -> Tensor:
    """float32 `[B, outer heads, R, F, S]`: cost of R tokens of the source frame with every token of every frame.

    Args:
        table: of the pairs (frame, source), every frame once and in order; `backward [B, H or 1, F * S]` is their
            log-sum-exp, None for the forward direction alone. forward: `[B, H or 1, F, R]`.
    """
    frames, rows = table.frames, tokens.shape[0]
    costs = torch.empty(
        q.shape[0], arrangement.outer, rows, frames, table.frame_tokens, dtype=torch.float32, device=q.device
    )
    tiles = choose_tiles("cost_rows", q)
    mask = table.pairs if key_mask is None else key_mask
    programs = tile_count(rows, tiles.rows) * frames * tile_count(table.frame_tokens, tiles.columns)
    launch(
        cost_rows_kernel, (programs, q.shape[0] * arrangement.outer),
        q, k, costs if arrangement.factors is None else arrangement.factors, forward,
        forward if backward is None else backward, costs, tokens, table.queries, table.keys, mask, q.stride(),
        k.stride(), mask.stride(), arrangement.outer, arrangement.inner, q.shape[1] // k.shape[1], rows, frames,
        table.frame_tokens, source, factor,
        D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, FOLDED=arrangement.folded,
        BIDIRECTIONAL=backward is not None, HAS_MASK=key_mask is not None, PARTS=not table.whole,
        WEIGHTED=arrangement.factors is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return costs


def mass_of_rows(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    segments: Sequence[int],
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
    statistics: Tensor,
) -> tuple[Tensor, Tensor]:
    """(sum, peak) float32 `[B, outer heads, G, R]` of the weights of R tokens on G segments.

    Args:
        statistics: `[B, H or 1, 1, R]` log-sum-exp over all keys.
    """
    table = token_segments(tuple(segments), q.device)
    shape = (q.shape[0], arrangement.outer, len(table), tokens.shape[0])
    sums, peaks = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    tiles = choose_tiles("attention_mass", q)
    mask = table if key_mask is None else key_mask
    launch(
        attention_mass_kernel,
        (len(table) * tile_count(tokens.shape[0], tiles.rows), q.shape[0] * arrangement.outer),
        q, k, table if arrangement.factors is None else arrangement.factors, statistics, sums, peaks, tokens, table,
        mask, q.stride(), k.stride(), mask.stride(), arrangement.outer, arrangement.inner, q.shape[1] // k.shape[1],
        tokens.shape[0], len(table), factor,
        D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, FOLDED=arrangement.folded,
        HAS_MASK=key_mask is not None, WEIGHTED=arrangement.factors is not None, PRECISION=product_precision(),
        tiles=tiles,
    )  # fmt: skip
    return sums, peaks
