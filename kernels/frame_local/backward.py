"""Gradients of frame-local attention: dq in one kernel, dk and dv in another, neither with atomics.

With P recomputed from the saved log-sum-exp and o the output, `dlogit = P * (do.v - do.o)`; do.v is 0 for keys whose
weight is dropped after the softmax, which still take part through the normalisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.frame_local.forward import LocalLayout, tile_stretch, visible_stretch
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch
from corrdit.kernels.shared.primitives import exponentials, load_allowed, load_tile, multiply, product, store_tile, wide
from corrdit.problem import product_precision


@triton.jit
def local_backward_query_kernel(
    q, k, v, gradient, dq, statistics, deltas, key_mask, q_strides, k_strides, v_strides, gradient_strides, dq_strides,
    mask_strides, heads, tokens, layout, scale, logit_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch * head): dq of its rows."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first_row, last_row, frame = tile_stretch(tl.program_id(0), layout, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    kept_rows = rows < last_row
    dims = tl.arange(0, BLOCK_D)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1]
    v += wide(batch) * v_strides[0] + wide(head) * v_strides[1]
    gradient += wide(batch) * gradient_strides[0] + wide(head) * gradient_strides[1]
    dq += wide(batch) * dq_strides[0] + wide(head) * dq_strides[1]
    key_mask += wide(batch) * mask_strides[0]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    gradient_tile = load_tile(gradient, rows, dims, gradient_strides, kept_rows, True, D)
    own = wide(tl.program_id(1)) * tokens + rows
    level = tl.load(statistics + own, mask=kept_rows, other=float("inf"))
    delta = tl.load(deltas + own, mask=kept_rows, other=0.0)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        start, end = visible_stretch(part, frame, layout)
        for first in range(start, end, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            inside = load_allowed(key_mask, columns, columns < end, mask_strides[1], HAS_MASK)
            k_tile = load_tile(k, columns, dims, k_strides, inside, True, D)  # [N, D]
            scores = product(q_tile, tl.trans(k_tile), PRECISION)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            weights = exponentials(scores, scale, level[:, None])
            if part < 2:
                v_tile = load_tile(v, columns, dims, v_strides, inside, True, D)
                dlogit = weights * (product(gradient_tile, tl.trans(v_tile), PRECISION) - delta[:, None])
            else:
                dlogit = -weights * delta[:, None]
            accumulator = multiply(dlogit.to(k_tile.dtype), k_tile, accumulator, PRECISION)
    store_tile(dq, accumulator * logit_scale, rows, dims, dq_strides, kept_rows, D)


@triton.jit
def local_backward_key_kernel(
    q, k, v, gradient, dk, dv, statistics, deltas, key_mask, q_strides, k_strides, v_strides, gradient_strides,
    dk_strides, mask_strides, heads, tokens, layout, scale, logit_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, batch * head): dk and dv of its keys, over the queries that see them."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first_key, last_key, frame = tile_stretch(tl.program_id(0), layout, BLOCK_N)
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < last_key
    dims = tl.arange(0, BLOCK_D)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1]
    v += wide(batch) * v_strides[0] + wide(head) * v_strides[1]
    gradient += wide(batch) * gradient_strides[0] + wide(head) * gradient_strides[1]
    dk += wide(batch) * dk_strides[0] + wide(head) * dk_strides[1]
    dv += wide(batch) * dk_strides[0] + wide(head) * dk_strides[1]
    kept = load_allowed(key_mask + wide(batch) * mask_strides[0], keys, inside, mask_strides[1], HAS_MASK)
    k_tile = load_tile(k, keys, dims, k_strides, kept, True, D)  # [N, D]
    v_tile = load_tile(v, keys, dims, v_strides, kept, True, D)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        start, end = visible_stretch(part, frame, layout)
        for first in range(start, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            kept_rows = rows < end
            own = wide(tl.program_id(1)) * tokens + rows
            # Rows past the end have weight 0 by their infinite log-sum-exp.
            level = tl.load(statistics + own, mask=kept_rows, other=float("inf"))
            delta = tl.load(deltas + own, mask=kept_rows, other=0.0)
            q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
            # Transposed, so that the products with weights and dlogit take them from registers as they are.
            weights = exponentials(product(k_tile, tl.trans(q_tile), PRECISION), scale, level[None, :])  # [N, M]
            if part < 2:
                gradient_tile = load_tile(gradient, rows, dims, gradient_strides, kept_rows, True, D)
                sum_v = multiply(weights.to(gradient_tile.dtype), gradient_tile, sum_v, PRECISION)
                dlogit = weights * (product(v_tile, tl.trans(gradient_tile), PRECISION) - delta[None, :])
            else:
                dlogit = -weights * delta[None, :]
            sum_k = multiply(dlogit.to(q_tile.dtype), q_tile, sum_k, PRECISION)
    sum_k = tl.where(kept[:, None], sum_k * logit_scale, 0.0)
    sum_v = tl.where(kept[:, None], sum_v, 0.0)
    store_tile(dk, sum_k, keys, dims, dk_strides, inside, D)
    store_tile(dv, sum_v, keys, dims, dk_strides, inside, D)


def local_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    statistics: Tensor,
    layout: LocalLayout,
    scale: float,
    key_mask: Tensor | None,
    renormalize: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq, dk, dv) `[B, H, N, D]` in the dtype of q: dq, and dk with dv, only if `wanted`.

    Args:
        gradient: `[B, H, N, D]` with respect to `output`, any strides.
        output, statistics: what `local_forward` gave. The rest as there.
    """
    batch, heads, tokens, head_dim = q.shape
    deltas = torch.einsum("bhnd,bhnd->bhn", gradient.to(torch.float32), output.to(torch.float32)).contiguous()
    mask = deltas[0] if key_mask is None else key_mask
    of_q, of_keys = wanted
    dq, dk, dv = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device) if asked else None for asked in (of_q, of_keys, of_keys)
    )
    for name, kernel, outputs in (
        ("local_backward_query", local_backward_query_kernel, (dq,)),
        ("local_backward_key", local_backward_key_kernel, (dk, dv)),
    ):
        if outputs[0] is None:
            continue
        tiles = choose_tiles(name, q)
        size = tiles.rows if len(outputs) == 1 else tiles.columns
        launch(
            kernel, (layout.tile_count(size), batch * heads),
            q, k, v, gradient, *outputs, statistics, deltas, mask, q.stride(), k.stride(), v.stride(),
            gradient.stride(), outputs[0].stride(), mask.stride(), heads, tokens, tuple(layout), scale, scale / LOG2_E,
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            PARTS=2 if renormalize else 4, HAS_MASK=key_mask is not None, PRECISION=product_precision(), tiles=tiles,
        )  # fmt: skip
    return dq, dk, dv
