"""Attention without its cross-frame part, in chunks of query rows, with a backward pass that computes them again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corrdit.grid import TokenGrid
from corrdit.streaming.budget import keys_in_a_segment, rows_in_a_chunk, working_dtype
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.once import first_gradient


def frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    key_mask: Tensor | None,
    renormalize: bool,
    span: int,
    memory_budget: int | None = None,
) -> Tensor:
    """`[B, H, N, D]` in the type of q, differentiable once; see `corrdit.ops.frame_local_attention`."""
    problem = _Problem(grid, scale, key_mask, renormalize, span, memory_budget)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        _Rows(q, problem, backward=True)  # a budget that only the backward pass would exceed is refused here
    attended: Tensor = _FrameLocalAttention.apply(q, k, v, problem)
    return attended


@dataclass(frozen=True)
class _Problem:
    grid: TokenGrid
    scale: float
    key_mask: Tensor | None
    renormalize: bool
    span: int
    memory_budget: int | None


class _FrameLocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.problem = problem
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, problem)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        compute = functools.partial(_gradients, ctx.problem)
        dq, dk, dv = first_gradient("frame_local_attention", compute, *ctx.saved_tensors, gradient)
        return dq, dk, dv, None


@dataclass(frozen=True)
class _Chunk:
    """Query rows and the stretches of keys their softmax goes over, `(keys, columns of the scores, whether seen)`.

    Keys that are not seen count in the softmax and are left out of the sum of values.
    """

    queries: slice
    stretches: list[tuple[slice, slice, bool]]

    @property
    def columns(self) -> int:
        return self.stretches[-1][1].stop


class _Rows:
    """Cuts the query rows into chunks."""

    def __init__(self, q: Tensor, problem: _Problem, *, backward: bool) -> None:
        self.grid, self.problem = problem.grid, problem
        grid, head_dim = problem.grid, q.shape[3]
        dtype = working_dtype(q.dtype)
        self._key_bytes = (4 if backward else 2) * head_dim * dtype.itemsize
        self._segment = keys_in_a_segment(problem.memory_budget, self._key_bytes, grid.tokens)
        # Sums for the keys and values of one head, where the gradients themselves are too coarse to add up in.
        sums = 2 * grid.tokens * head_dim * dtype.itemsize if backward and q.dtype != dtype else 0
        local = grid.text_tokens + min(grid.frames, 2 * problem.span + 1) * grid.tokens_per_frame
        self._of_text = self._chunk_rows(q, grid.tokens, grid.text_tokens, sums, backward)
        of_video = local if problem.renormalize else grid.tokens
        self._of_video = self._chunk_rows(q, of_video, grid.tokens_per_frame, sums, backward)

    def _chunk_rows(self, q: Tensor, columns: int, rows: int, sums: int, backward: bool) -> int:
        size, head_dim = working_dtype(q.dtype).itemsize, q.shape[3]
        return rows_in_a_chunk(
            self.problem.memory_budget,
            fixed_bytes=sums + self._segment * self._key_bytes + self.grid.tokens,
            row_bytes=columns * size * (2 if backward else 1) + 8 * head_dim * size,
            tile_row_bytes=columns * size,
            rows=max(rows, 1),
            device=q.device,
            purpose="the backward pass of frame-local attention" if backward else "frame-local attention",
        )

    def __iter__(self) -> Iterator[_Chunk]:
        grid, text = self.grid, self.grid.text_slice
        everything = self._stretches([(slice(0, grid.tokens), True)])
        yield from self._split(text, self._of_text, everything)
        for frame in range(grid.frames):
            first, last = max(0, frame - self.problem.span), min(grid.frames - 1, frame + self.problem.span)
            near = slice(grid.frame_slice(first).start, grid.frame_slice(last).stop)
            seen = [(text, True), (near, True)]
            if not self.problem.renormalize:
                video = grid.video_slice
                seen += [(slice(video.start, near.start), False), (slice(near.stop, video.stop), False)]
            yield from self._split(grid.frame_slice(frame), self._of_video, self._stretches(seen))

    @staticmethod
    def _split(queries: slice, rows: int, stretches: list[tuple[slice, slice, bool]]) -> Iterator[_Chunk]:
        for start in range(queries.start, queries.stop, rows):
            yield _Chunk(slice(start, min(start + rows, queries.stop)), stretches)

    def _stretches(self, parts: list[tuple[slice, bool]]) -> list[tuple[slice, slice, bool]]:
        """Cuts the parts into pieces short enough to be copied, and lays them side by side."""
        stretches: list[tuple[slice, slice, bool]] = []
        column = 0
        for part, seen in parts:
            for start in range(part.start, part.stop, self._segment):
                stop = min(start + self._segment, part.stop)
                stretches.append((slice(start, stop), slice(column, column + stop - start), seen))
                column += stop - start
        return stretches


class _Head:
    """q, k and v of one head, and the attention of a chunk of its rows."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, removed: Tensor | None, scale: float) -> None:
        self.q, self.k, self.v, self.removed = q, k, v, removed
        self.scale = scale
        self.dtype = working_dtype(q.dtype)

    def queries(self, chunk: _Chunk) -> Tensor:
        return self.q[chunk.queries].to(self.dtype)

    def rows_of(self, tensor: Tensor, tokens: slice) -> Tensor:
        """Keys or values in the working dtype; removed ones are 0, so that not even a NaN of theirs spreads."""
        rows = tensor[tokens].to(self.dtype)
        return rows if self.removed is None else rows.masked_fill(self.removed[tokens].unsqueeze(-1), 0.0)

    def attention(self, chunk: _Chunk) -> Tensor:
        """`[n, columns]` softmax over the chunk's keys; 0 in a row without any."""
        queries = self.queries(chunk)
        scores = torch.empty((queries.shape[0], chunk.columns), dtype=self.dtype, device=queries.device)
        for keys, columns, _ in chunk.stretches:
            place = scores[:, columns]
            torch.addmm(place, queries, self.rows_of(self.k, keys).t(), beta=0, alpha=self.scale * LOG2_E, out=place)
            if self.removed is not None:
                place.masked_fill_(self.removed[keys], float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        if self.removed is not None:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        exponentials = scores.sub_(largest).exp2_()
        inverse = exponentials.sum(-1, keepdim=True).reciprocal_()
        if self.removed is not None:
            inverse.masked_fill_(inverse == float("inf"), 0.0)
        return exponentials.mul_(inverse)


def _heads(q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> Iterator[tuple[tuple[int, int], _Head]]:
    for batch in range(q.shape[0]):
        removed = None if problem.key_mask is None else ~problem.key_mask[batch]
        for head in range(q.shape[1]):
            yield (batch, head), _Head(q[batch, head], k[batch, head], v[batch, head], removed, problem.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> Tensor:
    result = torch.empty_like(q)
    chunks = _Rows(q, problem, backward=False)
    for place, head in _heads(q, k, v, problem):
        for chunk in chunks:
            attention = head.attention(chunk)
            attended = torch.zeros((attention.shape[0], q.shape[3]), dtype=head.dtype, device=q.device)
            for keys, columns, seen in chunk.stretches:
                if seen:
                    attended.addmm_(attention[:, columns], head.rows_of(v[place], keys))
            result[place][chunk.queries] = attended
    return result


def _gradients(problem: _Problem, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    chunks = _Rows(q, problem, backward=True)
    for place, head in _heads(q, k, v, problem):
        # Half precision is too coarse to add up in: such gradients are summed in float32 and rounded once.
        dk_sum, dv_sum = (total[place].to(head.dtype) for total in (dk, dv))
        for chunk in chunks:
            dq[place][chunk.queries] = _chunk_gradients(head, chunk, gradient[place], dk_sum, dv_sum)
        if dk.dtype != head.dtype:
            dk[place], dv[place] = dk_sum, dv_sum
    return dq, dk, dv


def _chunk_gradients(head: _Head, chunk: _Chunk, gradient: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Gradient of the chunk's queries; adds what the chunk gives to the gradients of keys and values."""
    queries, incoming = head.queries(chunk), gradient[chunk.queries].to(head.dtype)
    attention = head.attention(chunk)
    slopes = torch.zeros_like(attention)
    for keys, columns, seen in chunk.stretches:
        if seen:
            place = slopes[:, columns]
            torch.mm(incoming, head.rows_of(head.v, keys).t(), out=place)
            dv[keys].addmm_(attention[:, columns].t(), incoming)
    # d softmax: P * (dP - sum P dP), where dP is 0 for keys that are not seen.
    slopes.mul_(attention)
    slopes.addcmul_(attention, slopes.sum(-1, keepdim=True), value=-1.0)
    dq = torch.zeros_like(queries)
    for keys, columns, _ in chunk.stretches:
        dq.addmm_(slopes[:, columns], head.rows_of(head.k, keys), alpha=head.scale)
        dk[keys].addmm_(slopes[:, columns].t(), queries, alpha=head.scale)
    return dq
