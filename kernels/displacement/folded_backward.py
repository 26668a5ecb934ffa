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
from corrdit.kernels.displacement.soft_backward import gradient_rows, load_gradient_rows, logit_gradients
from corrdit.kernels.displacement.soft_forward import key_range, load_centers, masked_scores, window_kind
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import coordinate_tile, head_scores, weighted_scale, wide
from corrdit.kernels.shared.tables import coordinate_table
from corrdit.problem import product_precision

# A chunk of dlogit that the two products after it still find in the L2 cache of 9.0, 50 MiB.
WORKSPACE_BYTES = 32 * 1024 * 1024
# Elements of a row's stride: cuBLAS has fast tiles where rows begin on 16 bytes, and its largest on 128.
ALIGNMENT = 64
_ROWS_OF_TILE = 128


@triton.jit
def folded_gradient_kernel(
    q, k, head_weights, workspace, planes, shifts, table, key_mask, center,
    q_strides, k_strides, mask_strides, workspace_stride, heads, first_query, row_count, frame_tokens, width, scale,
    radius, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows, tile of keys of one pair of the run): dlogit into `workspace [R, pairs * S]`.

    Args:
        q, k, key_mask, planes, shifts, center: at the first token (or row) of the query frame and of the first of a
            run of pairs whose key frames follow each other.
    """
    tiles = tl.cdiv(frame_tokens, BLOCK_N)
    pair = wide(tl.program_id(1) // tiles) * frame_tokens
    first_key = tl.program_id(1) % tiles * BLOCK_N
    rows = first_query + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < first_query + row_count
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < frame_tokens
    center_x, center_y = load_centers(center, pair, rows, kept_rows, width, WINDOW)
    start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
    scale = weighted_scale(scale, head_weights, heads, WEIGHTED)
    stored = kept_rows[:, None] & inside[None, :]
    if (first_key < end) & (first_key + BLOCK_N > start):
        scores = head_scores(
            q, k + pair * k_strides[2], tl.minimum(rows, frame_tokens - 1), tl.minimum(keys, frame_tokens - 1),
            kept_rows, inside, q_strides, k_strides, head_weights, 0, heads, D, BLOCK_D, WEIGHTED, False, PRECISION,
        )  # fmt: skip
        scores = masked_scores(
            scores, keys, inside, key_mask + pair * mask_strides[1], mask_strides[1], center_x, center_y, radius, width,
            HAS_MASK, WINDOW,
        )  # fmt: skip
        row_planes, shift = load_gradient_rows(planes, shifts, pair, rows, kept_rows, True)
        coordinates = coordinate_tile(table, keys, inside, True)
        dlogit = logit_gradients(scores, scale, shift[:, None], row_planes, coordinates, PRECISION)
        # The workspace is small: int32 places, worked out after the product whose registers they would take.
        places = workspace + (rows - first_query)[:, None] * workspace_stride + (pair.to(tl.int32) + keys)[None, :]
        tl.store(places, dlogit.to(workspace.dtype.element_ty), mask=stored)
    else:
        # Out of reach of every window of the tile.
        places = workspace + (rows - first_query)[:, None] * workspace_stride + (pair.to(tl.int32) + keys)[None, :]
        tl.store(places, tl.zeros([BLOCK_M, BLOCK_N], workspace.dtype.element_ty), mask=stored)


class _KeyRun(NamedTuple):
    """Pairs of one query frame, next to each other in the list, whose key frames follow each other."""

    first_pair: int
    query_frame: int
    key_frame: int
    length: int


def key_runs(pairs: Sequence[int], longest: int) -> list[_KeyRun]:
    """The pairs (i0, j0, i1, j1, ...) cut into runs of at most `longest` pairs, in order and as equal as can be."""
    runs: list[_KeyRun] = []
    for index, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        last = runs[-1] if runs else None
        if last and last.query_frame == i and last.key_frame + last.length == j:
            runs[-1] = last._replace(length=last.length + 1)
        else:
            runs.append(_KeyRun(index, i, j, 1))
    cut: list[_KeyRun] = []
    for run in runs:
        parts = tile_count(run.length, longest)
        starts = [part * run.length // parts for part in range(parts + 1)]
        cut += [
            _KeyRun(run.first_pair + start, run.query_frame, run.key_frame + start, stop - start)
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


class _FoldedGradient(NamedTuple):
    """What every chunk of dlogit is computed from; see `folded_backward`."""

    q: Tensor
    k: Tensor
    factors: Tensor | None
    planes: Tensor
    shifts: Tensor
    coordinates: Tensor
    key_mask: Tensor | None
    center: Tensor | None
    window: int
    exponent: float
    frame_tokens: int
    width: int

    def write_chunk(self, workspace: Tensor, sample: int, run: _KeyRun, first: int, count: int) -> Tensor:
        """dlogit `[count, pairs * S]` of query rows `first` on against the keys of the run, in the workspace."""
        columns = run.length * self.frame_tokens
        dlogit = workspace[: count * aligned(columns)].view(count, -1)[:, :columns]
        start_q, start_k = run.query_frame * self.frame_tokens, run.key_frame * self.frame_tokens
        tiles = choose_tiles("folded_gradient", self.q)
        mask = dlogit if self.key_mask is None else self.key_mask[sample : sample + 1, start_k:]
        launch(
            folded_gradient_kernel,
            (tile_count(count, tiles.rows), run.length * tile_count(self.frame_tokens, tiles.columns)),
            self.q[sample, :, start_q:], self.k[sample, :, start_k:],
            self.coordinates if self.factors is None else self.factors, dlogit,
            self.planes[sample, 0, run.first_pair :], self.shifts[sample, 0, run.first_pair :], self.coordinates, mask,
            self.coordinates if self.center is None else self.center[sample, run.first_pair :],
            self.q.stride(), self.k.stride(), mask.stride(), dlogit.stride(0), self.q.shape[1], first, count,
            self.frame_tokens, self.width, self.exponent, self.window,
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
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    displacement: Tensor,
    statistics: Tensor,
    pairs: Sequence[int],
    height: int,
    width: int,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(dq, dk) `[B, H, F*S, D]` in the dtype of q, of those that are `wanted`.

    Beyond them it takes the workspace of `WORKSPACE_BYTES`, one sample of q and k, and the sums of one sample in
    float32: a frame takes part in many pairs, and rounding each contribution to the dtype of q would add up.

    Args:
        gradient: float32 `[B, 1, P, S, 2]`; displacement, statistics: what `folded_forward` gave.
        pairs: flat (i0, j0, i1, j1, ...). The rest as in `folded_forward`.
    """
    frame_tokens = height * width
    coordinates = coordinate_table(height, width, q.dtype, q.device)
    planes, shifts, ranges = gradient_rows(gradient.contiguous(), displacement, statistics, coordinates.dtype, width)
    exponent, factors = folded_scale(q.shape[1], scale, weights)
    chunks = _FoldedGradient(
        q, k, factors, planes, shifts, coordinates, key_mask, center, window, exponent, frame_tokens, width
    )
    # A chunk as square as may be is added to the fewest rows of dq and dk together: all rows of a frame, if they fit.
    room = max(WORKSPACE_BYTES // q.element_size(), aligned(frame_tokens))
    runs = key_runs(pairs, max(1, room // aligned(frame_tokens) // max(frame_tokens, _ROWS_OF_TILE)))
    longest = max(run.length for run in runs) * frame_tokens
    steps = chunk_rows(frame_tokens, longest, room)
    workspace = torch.empty(steps * aligned(longest), dtype=q.dtype, device=q.device)
    dq, dk = (torch.empty(q.shape, dtype=q.dtype, device=q.device) if asked else None for asked in wanted)
    for sample in range(q.shape[0]):
        removed = None if key_mask is None else ~key_mask[sample, :, None]
        # A NaN in a removed key would reach every query through the product.
        kept = k[sample] if removed is None or dq is None else k[sample].masked_fill(removed, 0.0)
        queries, keys = (None if out is None else joined_heads(t) for out, t in ((dk, q[sample]), (dq, kept)))
        sum_q, sum_k = (
            torch.zeros(q.shape[2], q.shape[1] * q.shape[3], dtype=torch.float32, device=q.device) if asked else None
            for asked in wanted
        )
        for run in runs:
            columns = slice(run.key_frame * frame_tokens, (run.key_frame + run.length) * frame_tokens)
            for first in range(0, frame_tokens, steps):
                count = min(steps, frame_tokens - first)
                dlogit = chunks.write_chunk(workspace, sample, run, first, count)
                rows = slice(run.query_frame * frame_tokens + first, run.query_frame * frame_tokens + first + count)
                if sum_q is not None and keys is not None:
                    add_product(sum_q[rows], dlogit, keys[columns])
                if sum_k is not None and queries is not None:
                    add_product(sum_k[columns], dlogit.transpose(0, 1), queries[rows])
        if removed is not None and sum_k is not None:
            sum_k.masked_fill_(removed, 0.0)
        for output, total in ((dq, sum_q), (dk, sum_k)):
            if output is not None and total is not None:
                by_head = total.unflatten(1, (q.shape[1], -1)).transpose(0, 1)  # [H, N, D]
                factor = ranges[sample, 0] * (exponent / LOG2_E)
                if factors is not None:
                    factor = (factor * factors[-1] * factors[:-1])[:, None, None]
                torch.mul(by_head, factor, out=output[sample])
    return dq, dk
