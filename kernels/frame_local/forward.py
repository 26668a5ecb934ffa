"""Frame-local attention: the forward kernel and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.frame_local.layout import LocalTable, head_of, load_run, tile_stretch, visible_runs
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    exponentials,
    load_allowed,
    load_tile,
    log_sum_exp,
    multiply,
    product,
    raise_peak,
    store_tile,
    wide,
)
from corrdit.problem import product_precision


@triton.jit
def attend(
    peak, total, mean, q_tile, k, v, tokens, inside, dims, k_strides, v_strides, scale, D: tl.constexpr,
    SEEN: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(running maximum `[M]`, sum of weights `[M]`, sum of weighted values `[M, D]`) with one more tile of keys.

    Args:
        SEEN: whether the values count, or the weights alone. GUARD: whether `inside [N]` is looked at.
    """
    k_tile = load_tile(k, tokens, dims, k_strides, inside, GUARD, D)  # [N, D]
    scores = product(q_tile, tl.trans(k_tile), PRECISION)
    if GUARD:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    peak, shift, shrink = raise_peak(peak, scores, scale)
    weights = exponentials(scores, scale, shift[:, None])
    total = total * shrink + tl.sum(weights, 1)
    mean = mean * shrink[:, None]
    if SEEN:
        v_tile = load_tile(v, tokens, dims, v_strides, inside, GUARD, D)
        mean = multiply(weights.to(v_tile.dtype), v_tile, mean, PRECISION)
    return peak, total, mean


@triton.jit
def local_forward_kernel(
    q, k, v, output, statistics, own, runs, starts, key_mask, q_strides, k_strides, v_strides, output_strides,
    mask_strides, heads, group, rows_of_head, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch * head): attention of its rows and their base-2 log-sum-exp."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first_row, last_row, stretch = tile_stretch(tl.program_id(0), tiles, own, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    kept_rows = rows < last_row
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    k, v = head_of(k, batch, head // group, k_strides), head_of(v, batch, head // group, v_strides)
    key_mask += wide(batch) * mask_strides[0]
    q_tile = load_tile(head_of(q, batch, head, q_strides), rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        first_run, last_run = visible_runs(starts, stretch, part, first_row < last_row)
        for index in range(first_run, last_run):
            start, end = load_run(runs, index)
            if HAS_MASK:
                for first in range(start, end, BLOCK_N):
                    tokens = first + columns
                    inside = load_allowed(key_mask, tokens, tokens < end, mask_strides[1], HAS_MASK)
                    peak, total, mean = attend(
                        peak, total, mean, q_tile, k, v, tokens, inside, dims, k_strides, v_strides, scale, D,
                        part == 0, True, PRECISION,
                    )  # fmt: skip
            else:
                bulk = start + (end - start) // BLOCK_N * BLOCK_N
                for first in range(start, bulk, BLOCK_N):
                    tokens = first + columns
                    peak, total, mean = attend(
                        peak, total, mean, q_tile, k, v, tokens, tokens < end, dims, k_strides, v_strides, scale, D,
                        part == 0, False, PRECISION,
                    )  # fmt: skip
                if bulk < end:
                    tokens = bulk + columns
                    peak, total, mean = attend(
                        peak, total, mean, q_tile, k, v, tokens, tokens < end, dims, k_strides, v_strides, scale, D,
                        part == 0, True, PRECISION,
                    )  # fmt: skip
    mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(head_of(output, batch, head, output_strides), mean, rows, dims, output_strides, kept_rows, D)
    own_row = wide(tl.program_id(1)) * rows_of_head + rows
    tl.store(statistics + own_row, log_sum_exp(peak, total, scale), mask=kept_rows)


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, table: LocalTable, scale: float, key_mask: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """(attention `[B, H, Nq, D]` in the dtype of q, base-2 log-sum-exp float32 `[B, H, Nq]`).

    Args:
        q: `[B, H, Nq, D]`; k, v: `[B, Hk, Nk, D]`, each head for H / Hk heads of q; any strides.
        table: of the queries, what they see. scale: scale * log2(e), above 0. key_mask: bool `[B, Nk]`.
        renormalize: whether the softmax runs over what is seen, or over all keys.
    """
    batch, heads, tokens, head_dim = q.shape
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = choose_tiles("local_forward", q)
    blocks = tile_count(table.longest, tiles.rows)
    mask = statistics[0] if key_mask is None else key_mask
    launch(
        local_forward_kernel, (len(table.own) * blocks, batch * heads),
        q, k, v, output, statistics, *table[:3], mask, q.stride(), k.stride(), v.stride(), output.stride(),
        mask.stride(), heads, heads // k.shape[1], tokens, blocks, scale,
        D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        PARTS=1 if renormalize else 2, HAS_MASK=key_mask is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return output, statistics
