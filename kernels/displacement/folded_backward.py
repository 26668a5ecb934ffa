"""Gradient of soft displacement of logits averaged over heads: dlogit in chunks, and plain matrix products of them.

The dq tile of the folded axis H * D fits neither registers nor shared memory, so a chunk of dlogit goes into a
workspace of fixed size. One sample of q and k is copied to `[N, H * D]` once (not at all where it lies so already), and
two matrix products of two axes each add the chunk to float32 sums of dq and dk: products batched over heads would read
the chunk from memory once for every head. With windows round the queries' own places a chunk is a band of token rows of
several query frames against the token rows that their windows reach in several key frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.folded import Weighted, weighted_queries
from corrdit.kernels.displacement.gradient_chunks import ALIGNMENT, Chunk, aligned, gradient_chunks
from corrdit.kernels.displacement.gradient_rows import gradient_rows, load_gradient_rows, logit_gradients
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    coordinate_tile,
    head_scores,
    key_frame,
    load_allowed,
    query_frame,
    weighted_scale,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.kernels.shared.windows import (
    extent,
    load_centers,
    place_code,
    seen_keys,
    stretch_tokens,
    window_bounds,
    window_kind,
)
from corrdit.problem import product_precision

# A chunk of dlogit that the two products after it still find in the L2 cache of 9.0, 50 MiB.
WORKSPACE_BYTES = 32 * 1024 * 1024


@triton.jit
def folded_gradient_kernel(
    q, k, common, workspace, planes, shifts, table, pairs, key_mask, center,
    q_strides, k_strides, mask_strides, workspace_stride, heads, group, first_pair, pair_step, row_tiles, key_tiles,
    first_column, first_row, row_count, first_key, stop_key, skipped, width, height, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows, tile of keys of one pair of the chunk): dlogit into `workspace [R, columns]`.

    Args:
        q, k, planes, shifts, key_mask, center: at the first token (or row) of the sample. common: read if WEIGHTED.
        first_pair, pair_step, first_column, first_row, first_key, stop_key, skipped: as in `Chunk`.
        row_count: rows of the workspace for every query frame.
    """
    turn = tl.program_id(0) // row_tiles
    key_turn = tl.program_id(1) // key_tiles
    pair = first_pair + turn * pair_step + key_turn
    q_place, q_first, _, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    local = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    kept_rows = local < row_count
    first, stop = tl.maximum(k_first, first_key), tl.minimum(k_stop, stop_key)
    # The workspace is small: int32 places.
    column = (k_place - first_column).to(tl.int32) + k_first - key_turn * skipped - first
    place = tl.program_id(1) % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = first + place
    tokens, inside = stretch_tokens(place, stop - first, first)
    center_x, center_y = load_centers(center, row_place, rows, kept_rows, width, WINDOW)
    scale = weighted_scale(scale, common, WEIGHTED)
    lowest, highest = window_bounds(center_x, center_y, radius, width, height)
    # What the store needs is worked out after the product, which leaves no registers for it.
    written = workspace + turn * row_count * workspace_stride + column
    reached = first < stop
    if WINDOW > 0:
        top_y, bottom_y = extent(center_y, kept_rows)
        first_y, last_y = extent(keys // width, inside)
        reached = reached & (top_y - radius <= last_y) & (bottom_y + radius >= first_y)
    if reached:
        scores = head_scores(
            q + q_place * q_strides[2], k + k_place * k_strides[2], tl.where(kept_rows, rows, q_first), tokens,
            kept_rows, inside, q_strides, k_strides, 1, group, 0, heads, D, BLOCK_D, False, PRECISION,
        )  # fmt: skip
        kept = load_allowed(key_mask + k_place * mask_strides[1], tokens, inside, mask_strides[1], HAS_MASK)
        if WINDOW > 0:
            seen = seen_keys(place_code(keys % width, keys // width), kept, lowest, highest, True)
        else:
            seen = kept[None, :]
        row_planes, shift = load_gradient_rows(planes, shifts, row_place, rows, kept_rows, True)
        coordinates = coordinate_tile(table, tokens, tokens, False)
        scores = tl.where(seen, scores, float("-inf"))
        dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
        if WINDOW > 0:
            # An undefined query reaches the keys in its window alone.
            dlogit = tl.where(seen, dlogit, 0.0)
        places = written + local[:, None] * workspace_stride + keys[None, :]
        stored = kept_rows[:, None] & inside[None, :]
        tl.store(places, dlogit.to(workspace.dtype.element_ty), mask=stored)
    else:
        # Out of reach of every window of the tile.
        places = written + local[:, None] * workspace_stride + keys[None, :]
        stored = kept_rows[:, None] & inside[None, :]
        tl.store(places, tl.zeros([BLOCK_M, BLOCK_N], workspace.dtype.element_ty), mask=stored)


def joined_heads(tensor: Tensor) -> Tensor:
    """`[H, N, D]` of one sample as `[N, H * D]` with aligned rows; a view where the memory is laid out so."""
    heads, tokens, head_dim = tensor.shape
    width = heads * head_dim
    if tensor.stride(2) == 1 and (heads == 1 or tensor.stride(0) == head_dim) and tensor.stride(1) % ALIGNMENT == 0:
        return tensor.as_strided((tokens, width), (tensor.stride(1), 1))
    joined = torch.empty(tokens, aligned(width), dtype=tensor.dtype, device=tensor.device)[:, :width]
    joined.unflatten(1, (heads, head_dim)).copy_(tensor.transpose(0, 1))
    return joined


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total `[pieces, tokens, W]` float32 += a @ b, never rounded to the dtype of the factors."""
    if total.device.type == "cpu":  # PyTorch gives float32 of 16-bit products on CUDA alone
        a, b = a.to(total.dtype), b.to(total.dtype)
    same = total.dtype == a.dtype
    if total.shape[0] > 1:
        total += (torch.mm(a, b) if same else torch.mm(a, b, out_dtype=total.dtype)).view(total.shape)
    elif same:
        total[0].addmm_(a, b)
    else:
        torch.addmm(total[0], a, b, out_dtype=total.dtype, out=total[0])


def mean_queries(q: Tensor, key_heads: int) -> Tensor:
    """`[Hk, N, D]` of one sample: the mean of the queries that read each key head."""
    group = q.shape[0] // key_heads
    return q if group == 1 else q.unflatten(0, (key_heads, group)).mean(1, dtype=torch.float32).to(q.dtype)


class _FoldedGradient(NamedTuple):
    """What every chunk of dlogit is computed from; see `folded_backward`."""

    weighted: Weighted
    k: Tensor
    planes: Tensor
    shifts: Tensor
    coordinates: Tensor
    table: FramePairTable
    key_mask: Tensor | None
    center: Tensor | None
    window: int
    exponent: float

    def write(self, workspace: Tensor, sample: int, chunk: Chunk) -> Tensor:
        """dlogit `[rows, keys]` of a chunk, in the workspace."""
        dlogit = workspace[: chunk.elements].view(chunk.queries.total, -1)[:, : chunk.keys.total]
        q, _, common = self.weighted
        # A mask or a window fits beside a full tile, both do not.
        tiles = choose_tiles("folded_gradient", q, self.key_mask is not None and self.window >= 0)
        held = min(self.table.longest, chunk.stop_key - chunk.first_key)
        row_tiles, key_tiles = tile_count(chunk.queries.tokens, tiles.rows), tile_count(held, tiles.columns)
        mask = dlogit if self.key_mask is None else self.key_mask[sample : sample + 1]
        launch(
            folded_gradient_kernel, (chunk.queries.pieces * row_tiles, chunk.key_frames * key_tiles),
            q[sample], self.k[sample], self.coordinates if common is None else common, dlogit,
            self.planes[sample, 0], self.shifts[sample, 0], self.coordinates, self.table.pairs, mask,
            self.coordinates if self.center is None else self.center[sample],
            q.stride(), self.k.stride(), mask.stride(), dlogit.stride(0), q.shape[1],
            q.shape[1] // self.k.shape[1], chunk.first_pair, chunk.pair_step, row_tiles, key_tiles,
            chunk.first_column, chunk.first_row, chunk.queries.tokens, chunk.first_key, chunk.stop_key, chunk.skipped,
            self.table.width, self.table.height, self.exponent, self.window,
            D=q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            HAS_MASK=self.key_mask is not None, WINDOW=window_kind(self.window, self.center),
            WEIGHTED=common is not None, PRECISION=product_precision(), tiles=tiles,
        )  # fmt: skip
        return dlogit


def folded_backward(
    gradient: Tensor | None,
    grad_level: Tensor | None,
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    displacement: Tensor,
    statistics: Tensor,
    pairs: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    table: FramePairTable,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk) in the shapes and dtype of q and k, of those that are `wanted`.

    Beyond them it takes the workspace of `WORKSPACE_BYTES`, one sample of q and k, and the sums of one sample in
    float32: a frame takes part in many pairs, and rounding each contribution to the dtype of q would add up.

    Args:
        gradient: float32 `[B, 1, R, 2]`; grad_level: `[B, 1, R]`; displacement, statistics: what `folded_forward` gave.
        pairs: flat (i0, j0, i1, j1, ...); queries, keys: see `gradient_chunks`. The rest as in `folded_forward`.
    """
    coordinates = coordinate_table(table.height, table.width, q.dtype, q.device)
    planes, shifts, ranges = gradient_rows(gradient, grad_level, displacement, statistics, coordinates.dtype, table)
    weighted, exponent = weighted_queries(q, weights), scale / q.shape[1]
    rows = _FoldedGradient(weighted, k, planes, shifts, coordinates, table, key_mask, center, window, exponent)
    room = max(WORKSPACE_BYTES // q.element_size(), aligned(table.longest))
    radius = window if table.whole and center is None else -1
    cut = gradient_chunks(pairs, queries, keys, table.longest, table.height, table.width, radius, room)
    workspace = torch.empty(max((chunk.elements for chunk in cut), default=0), dtype=q.dtype, device=q.device)
    dq, dk = (
        torch.empty(like.shape, dtype=q.dtype, device=q.device) if asked else None
        for like, asked in zip((q, k), wanted, strict=True)
    )
    for sample in range(q.shape[0]):
        _sample_gradients(rows, sample, cut, workspace, ranges[sample, 0], dq, dk)
    return dq, dk


def _sample_gradients(
    rows: _FoldedGradient,
    sample: int,
    chunks: Sequence[Chunk],
    workspace: Tensor,
    gradient_range: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
) -> None:
    """Writes dq and dk of one sample, of those that are there. Head h of dq takes the sums of its key head."""
    weighted, factors, common = rows.weighted
    q, k = weighted[sample], rows.k[sample]
    key_heads = k.shape[0]
    group = q.shape[0] // key_heads
    removed = None if rows.key_mask is None else ~rows.key_mask[sample, :, None]
    keys = queries = sum_q = sum_k = None
    if dq is not None:
        # A NaN in a removed key, or in one outside a window, would reach every query through the product.
        kept = k if removed is None else k.masked_fill(removed, 0.0)
        keys = joined_heads(kept if rows.window < 0 else kept.nan_to_num(0.0, 0.0, 0.0))
        sum_q = torch.zeros(q.shape[1], keys.shape[1], dtype=torch.float32, device=q.device)
    if dk is not None:
        queries = joined_heads(mean_queries(q, key_heads))
        sum_k = torch.zeros(k.shape[1], queries.shape[1], dtype=torch.float32, device=q.device)
    for chunk in chunks:
        dlogit = rows.write(workspace, sample, chunk)
        if sum_q is not None and keys is not None:
            add_product(chunk.queries.of(sum_q), dlogit, chunk.keys.of(keys).flatten(0, 1))
        if sum_k is not None and queries is not None:
            add_product(chunk.keys.of(sum_k), dlogit.transpose(0, 1), chunk.queries.of(queries).flatten(0, 1))
    if removed is not None and sum_k is not None:
        sum_k.masked_fill_(removed, 0.0)
    factor = gradient_range * (rows.exponent / LOG2_E)
    of_heads = factor.expand(q.shape[0])
    if factors is not None and common is not None:
        factor = factor * common
        of_heads = factor * factors
    if dq is not None and sum_q is not None:
        by_head = sum_q.unflatten(1, (key_heads, 1, -1)).permute(1, 2, 0, 3)  # [Hk, 1, N, D]
        factors_of_heads = of_heads.unflatten(0, (key_heads, group, 1, 1))
        torch.mul(by_head, factors_of_heads, out=dq[sample].unflatten(0, (key_heads, group)))
    if dk is not None and sum_k is not None:
        by_head = sum_k.unflatten(1, (key_heads, -1)).transpose(0, 1)  # [Hk, N, D]
        torch.mul(by_head, factor * group, out=dk[sample])
        if rows.window >= 0:
            # An undefined key has its scores, and no gradient: see `corrdit.reference.scores`.
            dk[sample].masked_fill_(~k.isfinite().all(-1, keepdim=True), 0.0)
