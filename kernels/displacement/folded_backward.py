"""Gradient of soft displacement of logits averaged over heads: dlogit in chunks, and plain matrix products of them.

The dq tile of the folded axis H * D fits neither registers nor shared memory, so a chunk of dlogit goes into a
workspace of fixed size. One sample of q and k is copied to `[N, H * D]` once (not at all where it lies so already), and
two matrix products of two axes each add the chunk to float32 sums of dq and dk: products batched over heads would read
the chunk from memory once for every head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.folded import folded_scale
from corrdit.kernels.displacement.gradient_rows import gradient_rows, load_gradient_rows, logit_gradients
from corrdit.kernels.displacement.soft_forward import masked_scores
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    coordinate_tile,
    head_scores,
    key_frame,
    query_frame,
    weighted_scale,
)
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.kernels.shared.windows import extent, load_centers, window_bounds, window_kind
from corrdit.problem import product_precision

# A chunk of dlogit that the two products after it still find in the L2 cache of 9.0, 50 MiB.
WORKSPACE_BYTES = 32 * 1024 * 1024
# Elements of a row's stride: cuBLAS has fast tiles where rows begin on 16 bytes, and its largest on 128.
ALIGNMENT = 64
_ROWS_OF_TILE = 128


@triton.jit
def folded_gradient_kernel(
    q, k, head_weights, workspace, planes, shifts, table, pairs, key_mask, center,
    q_strides, k_strides, mask_strides, workspace_stride, heads, group, first_pair, tiles, first_column, first_row,
    row_count, width, scale, radius, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows, tile of keys of one pair of the run): dlogit into `workspace [R, columns]`.

    Args:
        q, k, planes, shifts, key_mask, center: at the first token (or row) of the sample.
        first_pair: of the run. first_column: place of its first key in k. first_row: token of the query frame whose
            row is the workspace's first; row_count: of the workspace.
    """
    pair = first_pair + tl.program_id(1) // tiles
    q_place, q_first, _, row_place = query_frame(pairs, pair)
    k_place, k_first, k_stop = key_frame(pairs, pair)
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    kept_rows = local < row_count
    keys = k_first + tl.program_id(1) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < k_stop
    center_x, center_y = load_centers(center, row_place, rows, kept_rows, width, WINDOW)
    scale = weighted_scale(scale, head_weights, heads, WEIGHTED)
    lowest, highest = window_bounds(center_x, center_y, radius)
    stored = kept_rows[:, None] & inside[None, :]
    reached = k_first < k_stop
    if WINDOW > 0:
        top_y, bottom_y = extent(center_y, kept_rows)
        first_y, last_y = extent(keys // width, inside)
        reached = reached & (top_y - radius <= last_y) & (bottom_y + radius >= first_y)
    # The workspace is small: int32 places.
    column = (k_place - first_column).to(tl.int32) + keys
    if reached:
        scores = head_scores(
            q + q_place * q_strides[2], k + k_place * k_strides[2], tl.where(kept_rows, rows, q_first),
            tl.where(inside, keys, k_first), kept_rows, inside, q_strides, k_strides, 1, group, head_weights, 0, heads,
            D, BLOCK_D, WEIGHTED, False, PRECISION,
        )  # fmt: skip
        scores = masked_scores(
            scores, keys, keys % width, keys // width, inside, key_mask + k_place * mask_strides[1], mask_strides[1],
            lowest, highest, HAS_MASK, WINDOW,
        )  # fmt: skip
        row_planes, shift = load_gradient_rows(planes, shifts, row_place, rows, kept_rows, True)
        coordinates = coordinate_tile(table, keys, inside, True)
        dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
        if WINDOW > 0:
            # An undefined query reaches the keys in its window alone.
            dlogit = tl.where(scores == float("-inf"), 0.0, dlogit)
        places = workspace + local[:, None] * workspace_stride + column[None, :]
        tl.store(places, dlogit.to(workspace.dtype.element_ty), mask=stored)
    else:
        # Out of reach of every window of the tile.
        places = workspace + local[:, None] * workspace_stride + column[None, :]
        tl.store(places, tl.zeros([BLOCK_M, BLOCK_N], workspace.dtype.element_ty), mask=stored)


class _KeyRun(NamedTuple):
    """Pairs of one query frame, next to each other in the list, whose keys follow each other in k.

    Attributes:
        first_query, queries: place of the query frame's first held token in q, and how many there are.
        first_token: its number in the frame.
        first_key, keys: the same of the keys of all pairs in k.
    """

    first_pair: int
    length: int
    query_frame: int
    first_query: int
    queries: int
    first_token: int
    first_key: int
    keys: int


def key_runs(pairs: Sequence[int], queries: Sequence[int], keys: Sequence[int], longest: int) -> list[_KeyRun]:
    """The pairs (i0, j0, i1, j1, ...) cut into runs of at most `longest` pairs, in order and as equal as can be.

    Args:
        queries, keys: what q and k hold of every frame, see `TokenAxis.places`. Pairs without any are left out.
    """
    runs: list[list[_KeyRun]] = []
    for index, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        (place, first, stop), (k_place, k_first, k_stop) = queries[3 * i : 3 * i + 3], keys[3 * j : 3 * j + 3]
        if first == stop or k_first == k_stop:
            continue
        one = _KeyRun(index, 1, i, place + first, stop - first, first, k_place + k_first, k_stop - k_first)
        last = runs[-1][-1] if runs else None
        follows = last and (last.query_frame, last.first_pair + 1, last.first_key + last.keys) == (
            i, index, one.first_key,
        )  # fmt: skip
        if follows:
            runs[-1].append(one)
        else:
            runs.append([one])
    cut: list[_KeyRun] = []
    for run in runs:
        parts = tile_count(len(run), longest)
        starts = [part * len(run) // parts for part in range(parts + 1)]
        cut += [
            run[start]._replace(length=stop - start, keys=sum(one.keys for one in run[start:stop]))
            for start, stop in itertools.pairwise(starts)
        ]
    return cut


def aligned(columns: int) -> int:
    """The stride of rows of so many columns."""
    return tile_count(columns, ALIGNMENT) * ALIGNMENT


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
    """total float32 += a @ b, in one pass and never rounded to the dtype of the factors."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":  # PyTorch gives float32 of 16-bit products on CUDA alone
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def summed_queries(q: Tensor, factors: Tensor | None, key_heads: int) -> Tensor:
    """`[Hk, N, D]` of one sample: the mean of the queries that read each key head, each times its factor."""
    group = q.shape[0] // key_heads
    if group == 1:
        return q
    weights = torch.ones(q.shape[0], device=q.device) if factors is None else factors[:-1]
    by_key = q.to(torch.float32).unflatten(0, (key_heads, group))
    return torch.einsum("jgnd,jg->jnd", by_key, weights.unflatten(0, (key_heads, group)) / group).to(q.dtype)


class _FoldedGradient(NamedTuple):
    """What every chunk of dlogit is computed from; see `folded_backward`."""

    q: Tensor
    k: Tensor
    factors: Tensor | None
    planes: Tensor
    shifts: Tensor
    coordinates: Tensor
    table: FramePairTable
    key_mask: Tensor | None
    center: Tensor | None
    window: int
    exponent: float

    def write_chunk(self, workspace: Tensor, sample: int, run: _KeyRun, first: int, count: int) -> Tensor:
        """dlogit `[count, keys]` of the run's query rows `first` on against its keys, in the workspace."""
        dlogit = workspace[: count * aligned(run.keys)].view(count, -1)[:, : run.keys]
        tiles = choose_tiles("folded_gradient", self.q)
        blocks = tile_count(self.table.longest, tiles.columns)
        mask = dlogit if self.key_mask is None else self.key_mask[sample : sample + 1]
        launch(
            folded_gradient_kernel, (tile_count(count, tiles.rows), run.length * blocks),
            self.q[sample], self.k[sample], self.coordinates if self.factors is None else self.factors, dlogit,
            self.planes[sample, 0], self.shifts[sample, 0], self.coordinates, self.table.pairs, mask,
            self.coordinates if self.center is None else self.center[sample],
            self.q.stride(), self.k.stride(), mask.stride(), dlogit.stride(0), self.q.shape[1],
            self.q.shape[1] // self.k.shape[1], run.first_pair, blocks, run.first_key, run.first_token + first, count,
            self.table.width, self.exponent, self.window,
            D=self.q.shape[-1], BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
            HAS_MASK=self.key_mask is not None, WINDOW=window_kind(self.window, self.center),
            WEIGHTED=int(self.factors is not None), PRECISION=product_precision(), tiles=tiles,
        )  # fmt: skip
        return dlogit


def chunk_rows(frame_tokens: int, columns: int, room: int) -> int:
    """Query rows of one chunk: whole tiles, as equal as can be, of what `room` elements of `columns` columns hold."""
    most = max(1, min(frame_tokens, room // aligned(columns)))
    equal = tile_count(frame_tokens, tile_count(frame_tokens, most))
    return min(most, tile_count(equal, _ROWS_OF_TILE) * _ROWS_OF_TILE)


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
        pairs: flat (i0, j0, i1, j1, ...); queries, keys: see `key_runs`. The rest as in `folded_forward`.
    """
    coordinates = coordinate_table(table.height, table.width, q.dtype, q.device)
    planes, shifts, ranges = gradient_rows(gradient, grad_level, displacement, statistics, coordinates.dtype, table)
    exponent, factors = folded_scale(q.shape[1], scale, weights)
    chunks = _FoldedGradient(q, k, factors, planes, shifts, coordinates, table, key_mask, center, window, exponent)
    # A chunk as square as may be is added to the fewest rows of dq and dk together: all rows of a frame, if they fit.
    room = max(WORKSPACE_BYTES // q.element_size(), aligned(table.longest))
    runs = key_runs(pairs, queries, keys, max(1, room // aligned(table.longest) // max(table.longest, _ROWS_OF_TILE)))
    longest = max((run.keys for run in runs), default=1)
    steps = chunk_rows(max((run.queries for run in runs), default=1), longest, room)
    workspace = torch.empty(steps * aligned(longest), dtype=q.dtype, device=q.device)
    dq, dk = (
        torch.empty(like.shape, dtype=q.dtype, device=q.device) if asked else None
        for like, asked in zip((q, k), wanted, strict=True)
    )
    for sample in range(q.shape[0]):
        _sample_gradients(chunks, sample, runs, steps, workspace, ranges[sample, 0], dq, dk)
    return dq, dk


def _sample_gradients(
    chunks: _FoldedGradient,
    sample: int,
    runs: Sequence[_KeyRun],
    steps: int,
    workspace: Tensor,
    gradient_range: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
) -> None:
    """Writes dq and dk of one sample, of those that are there. Head h of dq takes the sums of its key head."""
    q, k, factors = chunks.q[sample], chunks.k[sample], chunks.factors
    key_heads = k.shape[0]
    group = q.shape[0] // key_heads
    removed = None if chunks.key_mask is None else ~chunks.key_mask[sample, :, None]
    keys = queries = sum_q = sum_k = None
    if dq is not None:
        # A NaN in a removed key, or in one outside a window, would reach every query through the product.
        kept = k if removed is None else k.masked_fill(removed, 0.0)
        keys = joined_heads(kept if chunks.window < 0 else kept.nan_to_num(0.0, 0.0, 0.0))
        sum_q = torch.zeros(q.shape[1], keys.shape[1], dtype=torch.float32, device=q.device)
    if dk is not None:
        queries = joined_heads(summed_queries(q, factors, key_heads))
        sum_k = torch.zeros(k.shape[1], queries.shape[1], dtype=torch.float32, device=q.device)
    for run in runs:
        columns = slice(run.first_key, run.first_key + run.keys)
        for first in range(0, run.queries, steps):
            count = min(steps, run.queries - first)
            dlogit = chunks.write_chunk(workspace, sample, run, first, count)
            rows = slice(run.first_query + first, run.first_query + first + count)
            if sum_q is not None and keys is not None:
                add_product(sum_q[rows], dlogit, keys[columns])
            if sum_k is not None and queries is not None:
                add_product(sum_k[columns], dlogit.transpose(0, 1), queries[rows])
    if removed is not None and sum_k is not None:
        sum_k.masked_fill_(removed, 0.0)
    factor = gradient_range * (chunks.exponent / LOG2_E)
    of_heads = factor.expand(q.shape[0]) if factors is None else factor * factors[-1] * factors[:-1]
    if dq is not None and sum_q is not None:
        by_head = sum_q.unflatten(1, (key_heads, 1, -1)).permute(1, 2, 0, 3)  # [Hk, 1, N, D]
        factors_of_heads = of_heads.unflatten(0, (key_heads, group, 1, 1))
        torch.mul(by_head, factors_of_heads, out=dq[sample].unflatten(0, (key_heads, group)))
    if dk is not None and sum_k is not None:
        if group > 1:
            # The weights are in the queries' sum, a mean.
            of_heads = (factor * group if factors is None else factor * group * factors[-1]).expand(key_heads)
        by_head = sum_k.unflatten(1, (key_heads, -1)).transpose(0, 1)  # [Hk, N, D]
        torch.mul(by_head, of_heads[:, None, None], out=dk[sample])
        if chunks.window >= 0:
            # An undefined key has its scores, and no gradient: see `corrdit.reference.scores`.
            dk[sample].masked_fill_(~k.isfinite().all(-1, keepdim=True), 0.0)
