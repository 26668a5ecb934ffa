"""The running argmax of hard displacement and of matching: scores of a tile are looked at once and forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_forward import key_range, load_centers, window_kind
from corrdit.kernels.matching.correspondence import Heads, cost_tile
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import better_match, head_scores, load_allowed, no_token, wide
from corrdit.kernels.shared.tables import frame_pairs
from corrdit.problem import product_precision


@triton.jit
def best_match_kernel(
    q, k, head_weights, forward, backward, best_tokens, best_scores, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, outer, inner, pair_count, frame_tokens, width, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAW: tl.constexpr,
    FOLDED: tl.constexpr, BIDIRECTIONAL: tl.constexpr, ALLOWED_ONLY: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of source rows of one frame pair, batch * outer head): best key and its score for each row.

    RAW compares the products themselves, else the cost; ALLOWED_ONLY leaves removed keys out of the comparison, else
    only out of the softmax. A row without candidates keeps its own place.
    """
    tiles = tl.cdiv(frame_tokens, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = tl.program_id(1) // outer
    first_head = tl.program_id(1) % outer
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < frame_tokens
    q += wide(batch) * q_strides[0]
    k += wide(batch) * k_strides[0]
    key_mask += wide(batch) * mask_strides[0]
    query_first = wide(tl.load(pairs + 2 * pair)) * frame_tokens
    key_first = wide(tl.load(pairs + 2 * pair + 1)) * frame_tokens
    statistics_stride = wide(pair_count) * frame_tokens
    if FOLDED:
        statistics_head = wide(batch)
    else:
        statistics_head = wide(batch) * outer * inner + first_head
    forward += statistics_head * statistics_stride + wide(pair) * frame_tokens
    backward += statistics_head * statistics_stride + wide(pair) * frame_tokens
    allowed_rows = load_allowed(key_mask, query_first + rows, kept_rows, mask_strides[1], HAS_MASK)
    center_row = (wide(batch) * pair_count + pair) * frame_tokens
    center_x, center_y = load_centers(center, center_row, rows, kept_rows, width, WINDOW)
    start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    best_token = no_token(BLOCK_M)
    undefined_token = no_token(BLOCK_M)
    for first in range(start, end, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        inside = columns < end
        allowed = load_allowed(key_mask, key_first + columns, inside, mask_strides[1], HAS_MASK)
        if RAW:
            scores = head_scores(
                q, k, query_first + rows, key_first + columns, kept_rows, inside, q_strides, k_strides, head_weights,
                first_head, inner, D, BLOCK_D, WEIGHTED, True, PRECISION,
            )  # fmt: skip
        else:
            scores = cost_tile(
                q, k, head_weights, forward, backward, query_first + rows, key_first + columns, kept_rows, inside,
                allowed_rows, allowed, rows, columns, statistics_stride, statistics_stride, q_strides, k_strides,
                first_head, inner, scale, D, BLOCK_D, FOLDED, BIDIRECTIONAL, WEIGHTED, PRECISION,
            )  # fmt: skip
        if ALLOWED_ONLY:
            candidates = allowed[None, :]
        else:
            candidates = inside[None, :]
        if WINDOW > 0:
            near_x = tl.abs((columns % width)[None, :] - center_x[:, None]) <= radius
            near_y = tl.abs((columns // width)[None, :] - center_y[:, None]) <= radius
            candidates = candidates & near_x & near_y
        best, best_token, undefined_token = better_match(best, best_token, undefined_token, scores, columns, candidates)
    if COUNTED:
        tl.atomic_add(visited, tl.cdiv(end - start, BLOCK_N))
    undefined = undefined_token != no_token(BLOCK_M)
    best_token = tl.where(undefined, undefined_token, tl.where(best_token == no_token(BLOCK_M), rows, best_token))
    first_row = (wide(tl.program_id(1)) * pair_count + pair) * frame_tokens
    tl.store(best_tokens + first_row + rows, best_token, mask=kept_rows)
    tl.store(best_scores + first_row + rows, tl.where(undefined, float("nan"), best), mask=kept_rows)


def best_match(
    q: Tensor,
    k: Tensor,
    pairs: Sequence[tuple[int, int]],
    height: int,
    width: int,
    arrangement: Heads,
    factor: float,
    key_mask: Tensor | None,
    *,
    forward: Tensor | None = None,
    backward: Tensor | None = None,
    allowed_only: bool,
    center: Tensor | None = None,
    window: int = -1,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token int32, score float32), both `[B, outer heads, P, S]`.

    Args:
        q, k: `[B, H, F*S, D]`. factor: turns a product into a base-2 exponent.
        forward: base-2 log-sum-exp `[B, H or 1, P, S]` of the pairs, None to compare the products themselves.
        backward: the same of the swapped pairs, for the cost of both directions.
        allowed_only: whether removed keys are no candidates. center: int32 `[B, P, S, 2]`.
    """
    frame_tokens = height * width
    table = frame_pairs([frame for pair in pairs for frame in pair], q.shape[2] // frame_tokens, q.device).pairs
    shape = (q.shape[0], arrangement.outer, len(pairs), frame_tokens)
    tokens = torch.empty(shape, dtype=torch.int32, device=q.device)
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("best_match", q)
    mask = table if key_mask is None else key_mask
    launch(
        best_match_kernel, (len(pairs) * tile_count(frame_tokens, tiles.rows), q.shape[0] * arrangement.outer),
        q, k, table if arrangement.factors is None else arrangement.factors, scores if forward is None else forward,
        scores if backward is None else backward, tokens, scores, table, mask, table if center is None else center,
        table if visited is None else visited, q.stride(), k.stride(), mask.stride(), arrangement.outer,
        arrangement.inner, len(pairs), frame_tokens, width, factor, window,
        D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, RAW=forward is None,
        FOLDED=arrangement.folded, BIDIRECTIONAL=backward is not None, ALLOWED_ONLY=allowed_only,
        HAS_MASK=key_mask is not None, WINDOW=window_kind(window, center),
        WEIGHTED=int(arrangement.factors is not None), COUNTED=visited is not None, PRECISION=product_precision(),
        tiles=tiles,
    )  # fmt: skip
    return tokens, scores


def token_positions(tokens: Tensor, width: int) -> Tensor:
    """int64 `[..., 2]` (x, y) of flat tokens of a frame."""
    tokens = tokens.to(torch.int64)
    return torch.stack((tokens % width, tokens // width), dim=-1)
