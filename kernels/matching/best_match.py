"""The running argmax of the cost, for matching and for hard displacement of averaged probabilities.

Scores of a tile are looked at once and forgotten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.matching.correspondence import Heads, cost_tile
from corrdit.kernels.shared.launch import choose_tiles, launch
from corrdit.kernels.shared.primitives import better_match, key_frame, load_allowed, no_token, query_frame, wide
from corrdit.kernels.shared.tables import FramePairTable
from corrdit.kernels.shared.windows import (
    block_count,
    block_tokens,
    load_centers,
    place_code,
    reciprocal,
    seen_keys,
    tile_codes,
    tile_corner,
    tile_tokens,
    window_bounds,
    window_kind,
    window_tiles,
)
from corrdit.problem import product_precision


@triton.jit
def best_match_kernel(
    q, k, head_weights, forward, backward, best_tokens, best_scores, pairs, swapped, key_mask, center, visited,
    q_strides, k_strides, mask_strides, outer, inner, group, row_count, back_rows, tiles, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, ALLOWED_ONLY: tl.constexpr, HAS_MASK: tl.constexpr, WINDOW: tl.constexpr,
    PARTS: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of source rows of one frame pair, batch * outer head): best key and its cost for each row.

    ALLOWED_ONLY leaves keys that are removed or not held out of the comparison, else only out of the softmax. A key
    past the frame's last one is that last one once more. A row without candidates keeps its own place.
    """
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(1) // outer
    first_head = tl.program_id(1) % outer
    q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    back_q_place, _, _, back_row_place = query_frame(swapped, pair)
    back_k_place, back_k_first, back_k_stop = key_frame(swapped, pair)
    rows, kept_rows = block_tokens(tile, q_first, q_stop, width, BLOCK_M, WINDOW)
    # Rows past the end repeat the first one and are not stored, which saves the products their masks.
    source = tl.where(kept_rows, rows, q_first)
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    if FOLDED:
        statistics_head = wide(batch)
    else:
        statistics_head = wide(batch) * outer * inner + first_head
    forward += statistics_head * row_count + row_place
    backward += statistics_head * back_rows + back_row_place
    held_rows = (source >= back_k_first) & (source < back_k_stop)
    allowed_rows = load_allowed(key_mask, back_k_place + source, held_rows, mask_strides[1], HAS_MASK)
    center_x, center_y = load_centers(center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW)
    # None where q holds less of this frame than of others.
    turns = tl.where(q_first + tile * BLOCK_M < q_stop, tl.cdiv(width * height, BLOCK_N), 0)
    if WINDOW > 0:
        left, top, across, turns = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
        inverse = reciprocal(across)
    lowest, highest = window_bounds(center_x, center_y, radius, width, height)
    codes = tile_codes(BLOCK_N)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_token = no_token(BLOCK_M)
    undefined_token = no_token(BLOCK_M)
    for turn in range(0, turns):
        if WINDOW > 0:
            x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
            places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
        else:
            places = turn * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.minimum(places, width * height - 1)
        held = (columns >= k_first) & (columns < k_stop)
        allowed = load_allowed(key_mask, k_place + columns, held, mask_strides[1], HAS_MASK)
        cost = cost_tile(
            q, k, head_weights, forward, backward, q_place + source, k_place + columns, back_k_place + source,
            back_q_place + columns, allowed_rows, allowed, source, columns, wide(row_count), wide(back_rows), q_strides,
            k_strides, group, first_head, inner, scale, D, BLOCK_D, FOLDED, BIDIRECTIONAL, HAS_MASK, PARTS, WEIGHTED,
            PRECISION,
        )  # fmt: skip
        if WINDOW > 0:
            candidates = seen_keys(codes, allowed, lowest - corner, highest - corner, HAS_MASK or PARTS)
        elif ALLOWED_ONLY:
            candidates = allowed[None, :]
        else:
            candidates = (columns >= 0)[None, :]
        best, best_token, undefined_token = better_match(
            best, best_token, undefined_token, cost, columns[None, :], candidates
        )
    if COUNTED:
        tl.atomic_add(visited, turns)
    undefined = undefined_token != no_token(BLOCK_M)
    best_token = tl.where(undefined, undefined_token, tl.where(best_token == no_token(BLOCK_M), rows, best_token))
    first_row = wide(tl.program_id(1)) * row_count + row_place
    tl.store(best_tokens + first_row + rows, best_token, mask=kept_rows)
    tl.store(best_scores + first_row + rows, tl.where(undefined, float("nan"), best), mask=kept_rows)


def best_match(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
    forward: Tensor,
    *,
    swapped: FramePairTable | None = None,
    backward: Tensor | None = None,
    allowed_only: bool,
    center: Tensor | None = None,
    window: int = -1,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token int32, cost float32), both `[B, outer heads, R]`.

    Args:
        q, k: as in `soft_forward`. factor: turns a product into a base-2 exponent.
        forward: base-2 log-sum-exp `[B, H or 1, R]` of the pairs.
        swapped, backward: the swapped pairs and their log-sum-exp, for the cost of both directions.
        allowed_only: whether removed keys are no candidates. center: int32 `[B, R, 2]`.
    """
    shape = (q.shape[0], arrangement.outer, table.rows)
    tokens = torch.empty(shape, dtype=torch.int32, device=q.device)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    name = "best_match_folded" if arrangement.folded else "best_match_window" if window >= 0 else "best_match"
    tiles = choose_tiles(name, q, key_mask is not None or not table.whole)
    blocks = block_count(tiles.rows, table.longest, table.height, table.width, window)
    pairs, back = table.pairs, table if swapped is None else swapped
    mask = pairs if key_mask is None else key_mask
    launch(
        best_match_kernel, (len(pairs) * blocks, q.shape[0] * arrangement.outer),
        q, k, pairs if arrangement.factors is None else arrangement.factors, forward,
        forward if backward is None else backward, tokens, scores, pairs, back.pairs, mask,
        pairs if center is None else center, pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), arrangement.outer, arrangement.inner, q.shape[1] // k.shape[1],
        table.rows, back.rows, blocks, table.width, table.height, factor, window,
        D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, FOLDED=arrangement.folded,
        BIDIRECTIONAL=backward is not None, ALLOWED_ONLY=allowed_only, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), PARTS=not table.whole, WEIGHTED=arrangement.factors is not None,
        COUNTED=visited is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return tokens, scores


def token_positions(tokens: Tensor, width: int) -> Tensor:
    """int64 `[..., 2]` (x, y) of flat tokens of a frame."""
    tokens = tokens.to(torch.int64)
    return torch.stack((tokens % width, tokens // width), dim=-1)
