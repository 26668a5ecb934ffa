"""Soft displacement of logits averaged over heads: one product over the folded axis H * D.

The mean over heads of q_h.k_h is concat(q).concat(k) / H, so the forward kernel walks heads and dims by their strides
and never copies. In the backward pass the dq tile of the folded axis fits neither registers nor shared memory: a chunk
of dlogit goes into a workspace of fixed size, and ordinary matrix products make dq and dk of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.displacement.soft_backward import gradient_rows, load_gradient_rows, logit_gradients
from corrdit.kernels.displacement.soft_forward import (
    key_range,
    load_centers,
    masked_scores,
    store_displacement,
    window_kind,
)
from corrdit.kernels.shared.launch import LOG2_E, choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import accumulate_moments, coordinate_tile, head_scores, wide
from corrdit.kernels.shared.tables import FramePairTable, coordinate_table
from corrdit.problem import product_precision

WORKSPACE_BYTES = 64 * 1024 * 1024


@triton.jit
def folded_forward_kernel(
    q, k, head_weights, displacement, statistics, table, pairs, key_mask, center, visited,
    q_strides, k_strides, mask_strides, heads, pair_count, frame_tokens, width, scale, radius,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    WINDOW: tl.constexpr, WEIGHTED: tl.constexpr, COUNTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of query rows of one frame pair, batch): displacement and base-2 log-sum-exp of its rows."""
    tiles = tl.cdiv(frame_tokens, BLOCK_M)
    pair = tl.program_id(0) // tiles
    batch = tl.program_id(1)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kept_rows = rows < frame_tokens
    # Rows past the end repeat the last one and are not stored, which saves the products their masks.
    q_rows = tl.minimum(rows, frame_tokens - 1)
    columns = tl.arange(0, BLOCK_N)
    q += wide(batch) * q_strides[0] + wide(tl.load(pairs + 2 * pair)) * frame_tokens * q_strides[2]
    key_frame = wide(tl.load(pairs + 2 * pair + 1))
    k += wide(batch) * k_strides[0] + key_frame * frame_tokens * k_strides[2]
    key_mask += wide(batch) * mask_strides[0] + key_frame * frame_tokens * mask_strides[1]

    first_row = (wide(batch) * pair_count + pair) * frame_tokens
    center_x, center_y = load_centers(center, first_row, rows, kept_rows, width, WINDOW)
    start, end = key_range(center_y, kept_rows, radius, width, frame_tokens, WINDOW)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    moments = tl.zeros([BLOCK_M, 16], tl.float32)
    for first in range(start, end, BLOCK_N):
        inside = first + columns < end
        k_rows = tl.minimum(first + columns, frame_tokens - 1)
        scores = head_scores(
            q, k, q_rows, k_rows, kept_rows, inside, q_strides, k_strides, head_weights, 0, heads,
            D, BLOCK_D, WEIGHTED, False, PRECISION,
        )  # fmt: skip
        scores = masked_scores(
            scores, first + columns, inside, key_mask, mask_strides[1], center_x, center_y, radius, width,
            HAS_MASK, WINDOW,
        )  # fmt: skip
        coordinates = coordinate_tile(table + first * 16, columns, inside, True)
        peak, moments = accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION)
    if COUNTED:
        tl.atomic_add(visited, tl.cdiv(end - start, BLOCK_N))
    store_displacement(displacement, statistics, peak, moments, scale, width, rows, kept_rows, first_row)


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


def folded_scale(heads: int, scale: float, weights: Tensor | None) -> tuple[float, Tensor | None]:
    """(factor of the exponent, factors of the query heads): the mean over heads is one division by H.

    With weights, head h is multiplied by H * w_h, which keeps its magnitude in the dtype of q.
    """
    return scale / heads, None if weights is None else (weights.to(torch.float32) * heads).contiguous()


def folded_forward(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    table: FramePairTable,
    height: int,
    width: int,
    scale: float,
    key_mask: Tensor | None,
    center: Tensor | None,
    window: int,
    visited: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Displacement and log-sum-exp of the logits averaged over heads.

    Args:
        weights: `[H]` summing to 1, None for the mean. The rest as in `soft_forward`.

    Returns:
        float32 `[B, 1, P, S, 2]` and `[B, 1, P, S]`.
    """
    batch, heads, _, head_dim = q.shape
    frame_tokens, pair_count = height * width, table.pairs.shape[0]
    displacement = torch.empty(batch, 1, pair_count, frame_tokens, 2, dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch, 1, pair_count, frame_tokens, dtype=torch.float32, device=q.device)
    tiles = choose_tiles("folded_forward", q)
    mask = table.pairs if key_mask is None else key_mask
    exponent, factors = folded_scale(heads, scale, weights)
    launch(
        folded_forward_kernel, (pair_count * tile_count(frame_tokens, tiles.rows), batch),
        q, k, table.pairs if factors is None else factors, displacement, statistics,
        coordinate_table(height, width, q.dtype, q.device), table.pairs, mask,
        table.pairs if center is None else center, table.pairs if visited is None else visited,
        q.stride(), k.stride(), mask.stride(), heads, pair_count, frame_tokens, width, exponent, window,
        D=head_dim, BLOCK_D=tiles.dims, BLOCK_M=tiles.rows, BLOCK_N=tiles.columns, HAS_MASK=key_mask is not None,
        WINDOW=window_kind(window, center), WEIGHTED=int(factors is not None), COUNTED=visited is not None,
        PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return displacement, statistics


class _KeyRun(NamedTuple):
    """Pairs of one query frame, next to each other in the list, whose key frames follow each other."""

    first_pair: int
    query_frame: int
    key_frame: int
    length: int


def key_runs(pairs: Sequence[int], longest: int) -> list[_KeyRun]:
    """The pairs (i0, j0, i1, j1, ...) cut into runs of at most `longest` pairs, in order."""
    runs: list[_KeyRun] = []
    for index, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        last = runs[-1] if runs else None
        if last and last.query_frame == i and last.key_frame + last.length == j and last.length < longest:
            runs[-1] = last._replace(length=last.length + 1)
        else:
            runs.append(_KeyRun(index, i, j, 1))
    return runs


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
        dlogit = workspace[: count * run.length * self.frame_tokens].view(count, -1)
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
) -> tuple[Tensor, Tensor]:
    """(dq, dk) `[B, H, F*S, D]` in the dtype of q.

    Beyond them it takes the workspace of `WORKSPACE_BYTES` and the sums of one sample in float32: a frame takes part in
    many pairs, and rounding each contribution to the dtype of q would add up.

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
    # A run leaves room for a tile's worth of rows in the workspace.
    room = max(WORKSPACE_BYTES // q.element_size(), frame_tokens)
    runs = key_runs(pairs, max(1, room // (128 * frame_tokens)))
    longest = max(run.length for run in runs) * frame_tokens
    workspace = torch.empty(min(room, frame_tokens * longest), dtype=q.dtype, device=q.device)
    dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for sample in range(q.shape[0]):
        sum_q, sum_k = (torch.zeros(q.shape[1:], dtype=torch.float32, device=q.device) for _ in range(2))
        removed = None if key_mask is None else ~key_mask[sample, None, :, None]
        for run in runs:
            columns = slice(run.key_frame * frame_tokens, (run.key_frame + run.length) * frame_tokens)
            keys = k[sample, :, columns]
            if removed is not None:
                # A NaN in a removed key would reach every query through the product.
                keys = keys.masked_fill(removed[:, columns], 0.0)
            step = max(1, min(frame_tokens, room // (run.length * frame_tokens)))
            for first in range(0, frame_tokens, step):
                count = min(step, frame_tokens - first)
                dlogit = chunks.write_chunk(workspace, sample, run, first, count)
                rows = slice(run.query_frame * frame_tokens + first, run.query_frame * frame_tokens + first + count)
                sum_q[:, rows] += dlogit @ keys
                sum_k[:, columns] += dlogit.transpose(0, 1) @ q[sample, :, rows]
        if removed is not None:
            sum_k.masked_fill_(removed, 0.0)
        for output, total in ((dq, sum_q), (dk, sum_k)):
            total *= ranges[sample, 0] * (exponent / LOG2_E)
            output[sample] = total if factors is None else total * factors[:, None, None]
    return dq, dk
