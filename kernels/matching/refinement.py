"""Refining a match: the cost-weighted mean of positions near it, by a small second read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.matching.correspondence import Heads
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    key_frame,
    load_allowed,
    load_tile,
    query_frame,
    weighted_scale,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable


@triton.jit
def paired_scores(
    a, b, a_tokens, b_tokens, kept, a_strides, b_strides, a_group, b_group, first_head, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`[M]` products a[a_tokens[m]].b[b_tokens[m]] in float32, summed over `heads` heads from `first_head` on."""
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    scores = tl.zeros([a_tokens.shape[0]], tl.float32)
    for index in range(0, heads * chunks):
        head = first_head + index // chunks
        dims = (index % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
        a_tile = load_tile(a + wide(head // a_group) * a_strides[1], a_tokens, dims, a_strides, kept, True, D)
        b_tile = load_tile(b + wide(head // b_group) * b_strides[1], b_tokens, dims, b_strides, kept, True, D)
        scores += tl.sum(a_tile.to(tl.float32) * b_tile.to(tl.float32), 1)
    return scores


@triton.jit
def refinement_kernel(
    q, k, head_weights, forward, backward, best_tokens, positions, pairs, swapped, key_mask,
    q_strides, k_strides, mask_strides, outer, inner, group, row_count, back_rows, tiles, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, HAS_MASK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Program (tile of source rows of one frame pair, batch * outer head): mean position round each row's best key."""
    pair = tl.program_id(0) // tiles
    batch = tl.program_id(1) // outer
    first_head = tl.program_id(1) % outer
    q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    back_q_place, _, _, back_row_place = query_frame(swapped, pair)
    back_k_place, back_k_first, back_k_stop = key_frame(swapped, pair)
    rows = q_first + tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < q_stop
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    if FOLDED:
        statistics_head = wide(batch)
        turns = 1
        depth = inner
        scale = weighted_scale(scale, head_weights, WEIGHTED)
    else:
        statistics_head = wide(batch) * outer * inner + first_head
        turns = inner
        depth = 1
    forward += statistics_head * row_count + row_place
    backward += statistics_head * back_rows + back_row_place
    held_rows = kept_rows & (rows >= back_k_first) & (rows < back_k_stop)
    allowed_rows = load_allowed(key_mask, back_k_place + rows, held_rows, mask_strides[1], HAS_MASK)
    first_row = wide(tl.program_id(1)) * row_count + row_place
    best = tl.load(best_tokens + first_row + rows, mask=kept_rows, other=0)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_x = tl.zeros([BLOCK_M], tl.float32)
    sum_y = tl.zeros([BLOCK_M], tl.float32)
    side = 2 * radius + 1
    for offset in range(0, side * side):
        x = best % width + offset % side - radius
        y = best // width + offset // side - radius
        near = kept_rows & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        token = tl.where(near, y * width + x, 0)
        held = near & (token >= k_first) & (token < k_stop)
        allowed = load_allowed(key_mask, k_place + token, held, mask_strides[1], HAS_MASK)
        cost = tl.zeros([BLOCK_M], tl.float32)
        for turn in range(0, turns):
            share = 1.0
            if WEIGHTED and not FOLDED:
                share = tl.load(head_weights + first_head + turn)
            scores = paired_scores(
                q, k, q_place + rows, k_place + token, allowed, q_strides, k_strides, 1, group, first_head + turn,
                depth, D, BLOCK_D,
            )  # fmt: skip
            level = tl.load(forward + wide(turn) * row_count + rows, mask=kept_rows, other=float("inf"))
            part = tl.where(allowed, tl.exp2(scores * scale - level), 0.0)
            if BIDIRECTIONAL:
                scores = paired_scores(
                    k, q, back_k_place + rows, back_q_place + token, allowed_rows & near, k_strides, q_strides, group,
                    1, first_head + turn, depth, D, BLOCK_D,
                )  # fmt: skip
                level = tl.load(backward + wide(turn) * back_rows + token, mask=near, other=float("inf"))
                part = 0.5 * (part + tl.where(allowed_rows, tl.exp2(scores * scale - level), 0.0))
            cost += share * part
        cost = tl.where(near, cost, 0.0)
        total += cost
        sum_x += cost * (x - best % width).to(tl.float32)
        sum_y += cost * (y - best // width).to(tl.float32)
    # Without any weight the mean is not defined and the best key stands.
    divisor = tl.where(total == 0.0, 1.0, total)
    places = positions + (first_row + rows) * 2
    tl.store(places, (best % width).to(tl.float32) + sum_x / divisor, mask=kept_rows)
    tl.store(places + 1, (best // width).to(tl.float32) + sum_y / divisor, mask=kept_rows)


def refine(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
    forward: Tensor,
    swapped: FramePairTable,
    backward: Tensor | None,
    tokens: Tensor,
    radius: int,
) -> Tensor:
    """float32 `[B, outer heads, R, 2]`: the cost-weighted mean of positions within `radius` of the best tokens.

    Arguments as in `best_match`; `tokens` is what it gave.
    """
    positions = torch.empty(*tokens.shape, 2, dtype=torch.float32, device=q.device)
    # Rows of gathered keys, not products of tiles: half the rows leave room for both tiles in registers.
    tiles = choose_tiles("refinement", q)
    blocks = tile_count(table.longest, tiles.rows)
    mask = table.pairs if key_mask is None else key_mask
    launch(
        refinement_kernel, (len(table.pairs) * blocks, q.shape[0] * arrangement.outer),
        q, k, table.pairs if arrangement.factors is None else arrangement.factors, forward,
        forward if backward is None else backward, tokens, positions, table.pairs, swapped.pairs, mask, q.stride(),
        k.stride(), mask.stride(), arrangement.outer, arrangement.inner, q.shape[1] // k.shape[1], table.rows,
        swapped.rows, blocks, table.width, table.height, factor, min(radius, max(table.height, table.width)),
        D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, FOLDED=arrangement.folded,
        BIDIRECTIONAL=backward is not None, HAS_MASK=key_mask is not None,
        WEIGHTED=arrangement.factors is not None, tiles=tiles,
    )  # fmt: skip
    return positions
