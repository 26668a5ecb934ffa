"""Gradients of frame-local attention: one kernel for dq, one for dk and dv, neither with atomics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.frame_local.layout import LocalTable, head_of, load_run, tile_stretch, visible_runs
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import exponentials, load_allowed, load_tile, multiply, product, store_tile, wide
from corrdit.problem import product_precision

_HALF_RANGE = 2.0**14


@triton.jit
def add_keys(
    sum_q, q_tile, gradient_tile, level, delta, k, v, tokens, inside, dims, k_strides, v_strides, scale,
    D: tl.constexpr, SEEN: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[M, D]` with what one tile of keys adds; arguments as in `attend`."""
    k_tile = load_tile(k, tokens, dims, k_strides, inside, GUARD, D)  # [N, D]
    scores = product(q_tile, tl.trans(k_tile), PRECISION)
    if GUARD:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    weights = exponentials(scores, scale, level[:, None])
    if SEEN:
        v_tile = load_tile(v, tokens, dims, v_strides, inside, GUARD, D)
        dlogit = weights * (product(gradient_tile, tl.trans(v_tile), PRECISION) - delta[:, None])
    else:
        dlogit = -weights * delta[:, None]
    return multiply(dlogit.to(k_tile.dtype), k_tile, sum_q, PRECISION)


@triton.jit
def local_backward_query_kernel(
    q, k, v, gradient, dq, statistics, deltas, ranges, own, runs, starts, key_mask, q_strides, k_strides, v_strides,
    gradient_strides, dq_strides, mask_strides, heads, group, rows_of_head, tiles, scale, logit_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch * head): dq of its rows."""
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
    gradient = head_of(gradient, batch, head, gradient_strides)
    gradient_tile = load_tile(gradient, rows, dims, gradient_strides, kept_rows, True, D)
    own_row = wide(tl.program_id(1)) * rows_of_head + rows
    level = tl.load(statistics + own_row, mask=kept_rows, other=float("inf"))
    delta = tl.load(deltas + own_row, mask=kept_rows, other=0.0)
    sum_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        first_run, last_run = visible_runs(starts, stretch, part, first_row < last_row)
        for index in range(first_run, last_run):
            start, end = load_run(runs, index)
            if HAS_MASK:
                for first in range(start, end, BLOCK_N):
                    tokens = first + columns
                    inside = load_allowed(key_mask, tokens, tokens < end, mask_strides[1], HAS_MASK)
                    sum_q = add_keys(
                        sum_q, q_tile, gradient_tile, level, delta, k, v, tokens, inside, dims, k_strides, v_strides,
                        scale, D, part == 0, True, PRECISION,
                    )  # fmt: skip
            else:
                bulk = start + (end - start) // BLOCK_N * BLOCK_N
                for first in range(start, bulk, BLOCK_N):
                    tokens = first + columns
                    sum_q = add_keys(
                        sum_q, q_tile, gradient_tile, level, delta, k, v, tokens, tokens < end, dims, k_strides,
                        v_strides, scale, D, part == 0, False, PRECISION,
                    )  # fmt: skip
                if bulk < end:
                    tokens = bulk + columns
                    sum_q = add_keys(
                        sum_q, q_tile, gradient_tile, level, delta, k, v, tokens, tokens < end, dims, k_strides,
                        v_strides, scale, D, part == 0, True, PRECISION,
                    )  # fmt: skip
    sum_q *= logit_scale * tl.load(ranges + batch * (heads // group) + head // group)
    store_tile(head_of(dq, batch, head, dq_strides), sum_q, rows, dims, dq_strides, kept_rows, D)


@triton.jit
def add_queries(
    sum_k, sum_v, k_tile, v_tile, q, gradient, statistics, deltas, rows, kept_rows, dims, q_strides, gradient_strides,
    scale, D: tl.constexpr, OF_K: tl.constexpr, OF_V: tl.constexpr, SEEN: tl.constexpr, GUARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(dk, dv) `[N, D]` with what one tile of queries adds to those asked for.

    `statistics` and `deltas` are at its head's first row.
    """
    if GUARD:
        # Rows past the end have weight 0 by their infinite log-sum-exp.
        level = tl.load(statistics + rows, mask=kept_rows, other=float("inf"))
        delta = tl.load(deltas + rows, mask=kept_rows, other=0.0)
    else:
        level, delta = tl.load(statistics + rows), tl.load(deltas + rows)
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, GUARD, D)  # [M, D]
    # Transposed, so that the products with weights and dlogit take them from registers as they are.
    weights = exponentials(product(k_tile, tl.trans(q_tile), PRECISION), scale, level[None, :])  # [N, M]
    if SEEN:
        gradient_tile = load_tile(gradient, rows, dims, gradient_strides, kept_rows, GUARD, D)
        if OF_V:
            sum_v = multiply(weights.to(gradient_tile.dtype), gradient_tile, sum_v, PRECISION)
    if OF_K:
        if SEEN:
            dlogit = weights * (product(v_tile, tl.trans(gradient_tile), PRECISION) - delta[None, :])
        else:
            dlogit = -weights * delta[None, :]
        sum_k = multiply(dlogit.to(q_tile.dtype), q_tile, sum_k, PRECISION)
    return sum_k, sum_v


@triton.jit
def local_backward_key_kernel(
    q, k, v, gradient, dk, dv, statistics, deltas, ranges, own, runs, starts, key_mask, q_strides, k_strides, v_strides,
    gradient_strides, dk_strides, mask_strides, heads, group, rows_of_head, tiles, scale, logit_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    OF_K: tl.constexpr, OF_V: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, batch * key head): dk or dv, or both, over the queries of its `group` heads."""
    key_heads = heads // group
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    first_key, last_key, stretch = tile_stretch(tl.program_id(0), tiles, own, BLOCK_N)
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < last_key
    dims = tl.arange(0, BLOCK_D)
    queries = tl.arange(0, BLOCK_M)
    kept = load_allowed(key_mask + wide(batch) * mask_strides[0], keys, inside, mask_strides[1], HAS_MASK)
    k_tile = load_tile(head_of(k, batch, key_head, k_strides), keys, dims, k_strides, kept, True, D)  # [N, D]
    v_tile = load_tile(head_of(v, batch, key_head, v_strides), keys, dims, v_strides, kept, True, D)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        first_run, last_run = visible_runs(starts, stretch, part, first_key < last_key)
        for turn in range(0, (last_run - first_run) * group):
            head = key_head * group + turn % group
            start, end = load_run(runs, first_run + turn // group)
            first_row = (wide(batch) * heads + head) * rows_of_head
            q_head = head_of(q, batch, head, q_strides)
            gradient_head = head_of(gradient, batch, head, gradient_strides)
            bulk = start + (end - start) // BLOCK_M * BLOCK_M
            for first in range(start, bulk, BLOCK_M):
                rows = first + queries
                sum_k, sum_v = add_queries(
                    sum_k, sum_v, k_tile, v_tile, q_head, gradient_head, statistics + first_row, deltas + first_row,
                    rows, rows < end, dims, q_strides, gradient_strides, scale, D, OF_K, OF_V, part == 0, False,
                    PRECISION,
                )  # fmt: skip
            if bulk < end:
                rows = bulk + queries
                sum_k, sum_v = add_queries(
                    sum_k, sum_v, k_tile, v_tile, q_head, gradient_head, statistics + first_row, deltas + first_row,
                    rows, rows < end, dims, q_strides, gradient_strides, scale, D, OF_K, OF_V, part == 0, True,
                    PRECISION,
                )  # fmt: skip
    gradient_range = tl.load(ranges + tl.program_id(1))
    if OF_K:
        sum_k = tl.where(kept[:, None], sum_k * (logit_scale * gradient_range), 0.0)
        store_tile(head_of(dk, batch, key_head, dk_strides), sum_k, keys, dims, dk_strides, inside, D)
    if OF_V:
        sum_v = tl.where(kept[:, None], sum_v * gradient_range, 0.0)
        store_tile(head_of(dv, batch, key_head, dk_strides), sum_v, keys, dims, dk_strides, inside, D)


def gradient_ranges(gradient: Tensor, grad_level: Tensor | None, v: Tensor) -> Tensor:
    """float32 `[B, Hk]`, powers of two; divided by them a gradient has a dlogit within float16; 1 for other dtypes.

    By Cauchy and Schwarz no |dO.(v - o)| is above twice the largest |dO| times the largest |v|.
    """
    batch, key_heads = v.shape[:2]
    if v.dtype != torch.float16:
        return torch.ones(batch, key_heads, dtype=torch.float32, device=v.device)

    def longest(tensor: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
        return norms.masked_fill(~norms.isfinite(), 0.0).amax(-1)

    of_rows = longest(gradient).unflatten(1, (key_heads, -1)).amax(-1)
    largest = of_rows * torch.clamp(2 * longest(v), min=1.0)
    if grad_level is not None:
        levels = grad_level.abs().masked_fill(~grad_level.isfinite(), 0.0).amax(-1)
        largest = largest + LOG2_E * levels.unflatten(1, (key_heads, -1)).amax(-1)
    # Within what float32 can divide by, also where nothing or next to nothing is asked for.
    return torch.exp2(torch.log2(largest / _HALF_RANGE).ceil().clamp(-100.0, 100.0))


def local_backward(
    gradient: Tensor,
    grad_level: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    statistics: Tensor,
    tables: tuple[LocalTable, LocalTable],
    scale: float,
    key_mask: Tensor | None,
    renormalize: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) in the shapes of q, k and v and the dtype of q, of those that are `wanted`.

    Args:
        gradient: `[B, H, Nq, D]` with respect to `output`, any strides; grad_level: `[B, H, Nq]` to `statistics`.
        output, statistics: what `local_forward` gave.
        tables: of the queries and of the keys, what each sees of the other. The rest as in `local_forward`.
    """
    batch, heads, tokens, head_dim = q.shape
    ranges = gradient_ranges(gradient, grad_level, v)
    if q.dtype == torch.float16:
        by_head = ranges.repeat_interleave(heads // k.shape[1], 1)[..., None]
        gradient = (gradient / by_head[..., None]).to(q.dtype)
        grad_level = None if grad_level is None else grad_level / by_head
    deltas = torch.einsum("bhnd,bhnd->bhn", gradient.to(torch.float32), output.to(torch.float32)).contiguous()
    if grad_level is not None:
        # The log-sum-exp raises each logit's gradient by its weight, as the weighted mean of the values' lowers it.
        deltas = deltas - LOG2_E * grad_level
    mask = deltas[0] if key_mask is None else key_mask
    dq, dk, dv = (
        torch.empty(like.shape, dtype=q.dtype, device=q.device) if asked else None
        for like, asked in zip((q, k, v), wanted, strict=True)
    )

    def start(name: str, kernel: Any, results: Sequence[Tensor], table: LocalTable, rows: int, **asked: bool) -> None:
        tiles, first = choose_tiles(name, q), results[0]
        blocks = tile_count(table.longest, tiles[rows])
        launch(
            kernel, (len(table.own) * blocks, batch * first.shape[1]),
            q, k, v, gradient, *results, statistics, deltas, ranges, *table[:3], mask, q.stride(), k.stride(),
            v.stride(), gradient.stride(), first.stride(), mask.stride(), heads, heads // k.shape[1], tokens, blocks,
            scale, scale / LOG2_E,
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, **asked,
            PARTS=2 if dropped else 1, HAS_MASK=key_mask is not None, PRECISION=product_precision(), tiles=tiles,
        )  # fmt: skip

    # Keys out of reach that the softmax over all keys has: they take part in dq and dk, not in dv.
    dropped = not renormalize
    if dq is not None:
        start("local_backward_query", local_backward_query_kernel, [dq], tables[0], 0)
    if dk is not None or dv is not None:
        dropped = dropped and dk is not None
        both = [one for one in (dk, dv, dk if dv is None else dv) if one is not None][:2]
        start("local_backward_key", local_backward_key_kernel, both, tables[1], 1, OF_K=dk is not None,
              OF_V=dv is not None)  # fmt: skip
    return dq, dk, dv
