"""The running argmax of the products themselves, of single heads or of all heads together: hard displacement."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.matching.correspondence import Heads
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch
from corrdit.kernels.shared.primitives import (
    better_match,
    head_scores,
    is_nan,
    key_frame,
    load_allowed,
    load_tile,
    no_token,
    product,
    query_frame,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable
from corrdit.kernels.shared.windows import (
    block_count,
    block_tokens,
    held_tokens,
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

_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def best_product_kernel(
    q, k, best_tokens, pairs, key_mask, center, visited, q_strides, k_strides, mask_strides, outer, inner,
    group, row_count, tiles, width, height, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLDED: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch * outer head): the key of the largest product for each row.

    Of single heads every place of a tile of scores keeps the largest score it has seen, and in which turn; the places
    of a row are compared once, at the end. All heads take so much longer for a score that a row is compared for each
    tile, and the registers serve a larger one. A key past the frame's last one is that last one once more. A row
    without keys keeps its own place.
    """
    pair = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    batch = tl.program_id(1) // outer
    head = tl.program_id(1) % outer
    q_place, q_first, q_stop, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    rows, kept_rows = block_tokens(tile, q_first, q_stop, width, BLOCK_M, WINDOW)
    # Rows past the end repeat the first one and are not stored, which saves the products their masks.
    q_rows = tl.where(kept_rows, rows, q_first)
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + q_place * q_strides[2]
    k += wide(batch) * k_strides[0] + k_place * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + k_place * mask_strides[1]
    if not FOLDED:
        q += wide(head) * q_strides[1]
        k += wide(head // group) * k_strides[1]
        q_tile = load_tile(q, q_rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    center_x, center_y = load_centers(center, wide(batch) * row_count + row_place, rows, kept_rows, width, WINDOW)
    if WINDOW > 0:
        left, top, across, turns = window_tiles(center_x, center_y, kept_rows, radius, width, height, BLOCK_N)
        turns = tl.where(k_first < k_stop, turns, 0)
        inverse = reciprocal(across)
    else:
        # None where q holds less of this frame than of others.
        turns = tl.where(q_first + tile * BLOCK_M < q_stop, tl.cdiv(k_stop - k_first, BLOCK_N), 0)
    lowest, highest = window_bounds(center_x, center_y, radius, width, height)
    codes = tile_codes(BLOCK_N)
    none = no_token(BLOCK_M)
    best_of_row, best_token, undefined = tl.full([BLOCK_M], float("-inf"), tl.float32), none, none
    if not FOLDED:
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        found = tl.full([BLOCK_M, BLOCK_N], -1, tl.int32)
    for turn in range(0, turns):
        if WINDOW > 0:
            x, y = tile_corner(turn, left, top, across, inverse, BLOCK_N)
            places, corner = tile_tokens(x, y, width, BLOCK_N), place_code(x, y)
        else:
            places = k_first + turn * BLOCK_N + columns
        tokens = held_tokens(places, k_first, k_stop)
        kept = load_allowed(key_mask, tokens, places == tokens, mask_strides[1], HAS_MASK)
        if WINDOW > 0:
            seen = seen_keys(codes, kept, lowest - corner, highest - corner, HAS_MASK or PARTS)
        else:
            seen = kept[None, :]
        if FOLDED:
            scores = head_scores(
                q, k, q_rows, tokens, kept_rows, kept_rows, q_strides, k_strides, 1, group, 0, inner, D, BLOCK_D, False,
                PRECISION,
            )  # fmt: skip
            best_of_row, best_token, undefined = better_match(
                best_of_row, best_token, undefined, scores, tokens[None, :], seen
            )
        else:
            k_tile = load_tile(k, tokens, dims, k_strides, tokens, False, D)  # [N, D]
            scores = product(q_tile, tl.trans(k_tile), PRECISION)
            if HAS_MASK or WINDOW > 0:
                # A key that counts stands above those that do not, even at -inf.
                scores = tl.maximum(scores, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
                scores = tl.where(seen, scores, float("-inf"))
            # No best one is at least as large as NaN, and the first NaN of a place stays.
            stands = is_nan(best) | (scores <= best)
            best = tl.where(stands, best, scores)
            found = tl.where(stands, found, turn)
    if COUNTED:
        tl.atomic_add(visited, turns)
    if not FOLDED:
        if WINDOW > 0:
            x, y = tile_corner(found, left, top, across, inverse, BLOCK_N)
            of_places = y * width + x + tile_tokens(0, 0, width, BLOCK_N)[None, :]
        else:
            of_places = tl.minimum(k_first + found * BLOCK_N + columns[None, :], k_stop - 1)
        _, best_token, undefined = better_match(best_of_row, none, none, best, of_places, found >= 0)
    if HAS_MASK or WINDOW > 0:
        without = rows
    else:
        # All keys at -inf: the first one stands.
        without = tl.where(turns > 0, k_first, rows)
    best_token = tl.where(undefined != none, undefined, tl.where(best_token == none, without, best_token))
    first_row = wide(tl.program_id(1)) * row_count + row_place
    tl.store(best_tokens + first_row + rows, best_token, mask=kept_rows)


def best_product(
    q: Tensor,
    k: Tensor,
    table: FramePairTable,
    arrangement: Heads,
    key_mask: Tensor | None,
    center: Tensor | None = None,
    window: int = -1,
    visited: Tensor | None = None,
) -> Tensor:
    """int32 `[B, outer heads, R]`: the token of the largest q.k of each row, of single heads or summed over all.

    Args:
        q, k, table, key_mask, center, window, visited: as in `soft_forward`.
    """
    tokens = torch.empty(q.shape[0], arrangement.outer, table.rows, dtype=torch.int32, device=q.device)
    name = "best_product_folded" if arrangement.folded else "best_product"
    tiles = choose_tiles(f"{name}_window" if window >= 0 else name, q)
    blocks = block_count(tiles.rows, table.longest, table.height, table.width, window)
    pairs = table.pairs
    mask = pairs if key_mask is None else key_mask
    launch(
        best_product_kernel, (len(pairs) * blocks, q.shape[0] * arrangement.outer),
        q, k, tokens, pairs, mask,
        pairs if center is None else center, pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), arrangement.outer, arrangement.inner, q.shape[1] // k.shape[1],
        table.rows, blocks, table.width, table.height, window,
        D=q.shape[-1], BLOCK_D=tiles.dims if arrangement.folded else padded_head_dim(q.shape[-1]), BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns, FOLDED=arrangement.folded, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), PARTS=not table.whole,
        COUNTED=visited is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return tokens
