"""Attention without its cross-frame part, in chunks of query rows, with a backward pass that computes them again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from corrdit.problem import PairProblem, working_dtype
from corrdit.streaming.budget import keys_in_a_segment, rows_in_a_chunk
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.once import Context, first_gradient


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
) -> tuple[Tensor, Tensor | None]:
    """(attention in the shape and type of q, log-sum-exp `[B, H, tokens of q]` if asked for), differentiable once."""
    forward = _Rows(q, problem, renormalize, span, backward=False)
    backward = None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Made here, so that a budget that only the backward pass would exceed is refused before the work.
        backward = _Rows(q, problem, renormalize, span, backward=True)
    results: tuple[Tensor, Tensor | None] = _FrameLocalAttention.apply(q, k, v, forward, backward)
    return results


class _RowsContext(Context):
    rows: _Rows


class _FrameLocalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RowsContext, q: Tensor, k: Tensor, v: Tensor, forward: _Rows, backward: _Rows | None
    ) -> tuple[Tensor, Tensor | None]:
        # The mask as well: autograd refuses a backward pass after a change of it.
        ctx.save_for_backward(q, k, v, *forward.problem.limits)
        ctx.rows = backward or forward
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, forward)

    @staticmethod
    def backward(
        ctx: _RowsContext, gradient: Tensor, of_lse: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        compute = functools.partial(_gradients, ctx.rows)
        q, k, v, *_ = ctx.saved_tensors
        dq, dk, dv = first_gradient("frame_local_attention", compute, q, k, v, gradient, of_lse)
        return dq, dk, dv, None, None


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
    """Cuts the query rows into chunks; those without any key are left out."""

    def __init__(self, q: Tensor, problem: PairProblem, renormalize: bool, span: int, *, backward: bool) -> None:
        self.problem, self.renormalize, self.span = problem, renormalize, span
        grid, keys, head_dim, dtype = problem.grid, problem.keys.tokens, q.shape[3], working_dtype(q.dtype)
        self._key_bytes = (4 if backward else 2) * head_dim * dtype.itemsize
        self._segment = keys_in_a_segment(problem.memory_budget, self._key_bytes, keys)
        # Sums for the keys and values of one head, where the gradients themselves are too coarse to add up in.
        sums = 2 * keys * head_dim * dtype.itemsize if backward and q.dtype != dtype else 0
        local = min(keys, grid.text_tokens + min(grid.frames, 2 * span + 1) * grid.tokens_per_frame)
        self._of_text = self._chunk_rows(q, keys, grid.text_tokens, sums, backward)
        self._of_video = self._chunk_rows(q, local if renormalize else keys, grid.tokens_per_frame, sums, backward)

    def _chunk_rows(self, q: Tensor, columns: int, rows: int, sums: int, backward: bool) -> int:
        size, head_dim = working_dtype(q.dtype).itemsize, q.shape[3]
        return rows_in_a_chunk(
            self.problem.memory_budget,
            fixed_bytes=sums + self._segment * self._key_bytes + self.problem.keys.tokens,
            row_bytes=columns * size * (2 if backward else 1) + 8 * head_dim * size,
            tile_row_bytes=columns * size,
            rows=max(rows, 1),
            device=q.device,
            purpose="the backward pass of frame-local attention" if backward else "frame-local attention",
        )

    def __iter__(self) -> Iterator[_Chunk]:
        queries, keys, frames = self.problem.queries, self.problem.keys, self.problem.grid.frames
        yield from self._split(queries.text, self._of_text, self._stretches([(slice(0, keys.tokens), True)]))
        for frame, held in queries.frames.items():
            first, last = max(0, frame - self.span), min(frames - 1, frame + self.span)
            seen = [(keys.text, True), (keys.between(first, last), True)]
            if not self.renormalize:
                seen += [(keys.between(0, first - 1), False), (keys.between(last + 1, frames - 1), False)]
            stretches = self._stretches(seen)
            if stretches:
                yield from self._split(held.place, self._of_video, stretches)

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
    """q, k and v of one query head, and the attention of a chunk of its rows."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, removed: Tensor | None, factor: float) -> None:
        self.q, self.k, self.v, self.removed = q, k, v, removed
        self.factor = factor
        self.dtype = working_dtype(q.dtype)

    def queries(self, chunk: _Chunk) -> Tensor:
        return self.q[chunk.queries].to(self.dtype)

    def rows_of(self, tensor: Tensor, tokens: slice) -> Tensor:
        """Keys or values in the working dtype; removed ones are 0, so that not even a NaN of theirs spreads."""
        rows = tensor[tokens].to(self.dtype)
        return rows if self.removed is None else rows.masked_fill(self.removed[tokens].unsqueeze(-1), 0.0)

    def attention(self, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """(softmax `[n, columns]` over the chunk's keys, 0 in a row without any; its log-sum-exp `[n]`, there -inf)."""
        queries = self.queries(chunk)
        scores = torch.empty((queries.shape[0], chunk.columns), dtype=self.dtype, device=queries.device)
        for keys, columns, _ in chunk.stretches:
            place = scores[:, columns]
            torch.addmm(place, queries, self.rows_of(self.k, keys).t(), beta=0, alpha=self.factor * LOG2_E, out=place)
            if self.removed is not None:
                place.masked_fill_(self.removed[keys], float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        if self.removed is not None:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        exponentials = scores.sub_(largest).exp2_()
        sums = exponentials.sum(-1, keepdim=True)
        inverse = sums.reciprocal()
        if self.removed is not None:
            inverse.masked_fill_(inverse == float("inf"), 0.0)
        return exponentials.mul_(inverse), (sums.log2() + largest).squeeze(-1) / LOG2_E


def _key_heads(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """(batch, key head), and the (batch, query head) that read it."""
    share = q.shape[1] // k.shape[1]
    for batch in range(q.shape[0]):
        for head in range(k.shape[1]):
            yield (batch, head), [(batch, head * share + number) for number in range(share)]


def _attend(q: Tensor, k: Tensor, v: Tensor, chunks: _Rows) -> tuple[Tensor, Tensor | None]:
    problem = chunks.problem
    result = torch.zeros_like(q)
    lse = None
    if problem.with_lse:
        lse = torch.full(q.shape[:3], float("-inf"), dtype=working_dtype(q.dtype), device=q.device)
    for of_keys, of_queries in _key_heads(q, k):
        removed = None if problem.key_mask is None else ~problem.key_mask[of_keys[0]]
        for place in of_queries:
            head = _Head(q[place], k[of_keys], v[of_keys], removed, problem.factor)
            for chunk in chunks:
                _attend_chunk(head, chunk, result[place], None if lse is None else lse[place])
    return result, lse


def _attend_chunk(head: _Head, chunk: _Chunk, result: Tensor, lse: Tensor | None) -> None:
    """Writes the chunk's rows; a function of its own, so that its buffers are gone before the next chunk's are made."""
    attention, sums = head.attention(chunk)
    attended = torch.zeros((attention.shape[0], result.shape[1]), dtype=head.dtype, device=result.device)
    for keys, columns, seen in chunk.stretches:
        if seen:
            attended.addmm_(attention[:, columns], head.rows_of(head.v, keys))
    result[chunk.queries] = attended
    if lse is not None:
        lse[chunk.queries] = sums


def _gradients(
    chunks: _Rows, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, of_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    problem = chunks.problem
    for of_keys, of_queries in _key_heads(q, k):
        removed = None if problem.key_mask is None else ~problem.key_mask[of_keys[0]]
        # Half precision is too coarse to add up in: such gradients are summed in float32 and rounded once.
        dk_sum, dv_sum = (total[of_keys].to(working_dtype(q.dtype)) for total in (dk, dv))
        for place in of_queries:
            head = _Head(q[place], k[of_keys], v[of_keys], removed, problem.factor)
            slopes_of_lse = None if of_lse is None else of_lse[place]
            for chunk in chunks:
                dq[place][chunk.queries] = _chunk_gradients(head, chunk, gradient[place], slopes_of_lse, dk_sum, dv_sum)
        if dk.dtype != dk_sum.dtype:
            dk[of_keys], dv[of_keys] = dk_sum, dv_sum
        del dk_sum, dv_sum  # before those of the next head are made
    return dq, dk, dv


def _chunk_gradients(
    head: _Head, chunk: _Chunk, gradient: Tensor, of_lse: Tensor | None, dk: Tensor, dv: Tensor
) -> Tensor:
    """Gradient of the chunk's queries; adds what the chunk gives to the gradients of keys and values."""
    queries, incoming = head.queries(chunk), gradient[chunk.queries].to(head.dtype)
    attention, lse = head.attention(chunk)
    slopes = torch.zeros_like(attention)
    for keys, columns, seen in chunk.stretches:
        if seen:
            place = slopes[:, columns]
            torch.mm(incoming, head.rows_of(head.v, keys).t(), out=place)
            dv[keys].addmm_(attention[:, columns].t(), incoming)
    # d softmax: P * (dP - sum P dP), where dP is 0 for keys that are not seen; d log-sum-exp: P.
    slopes.mul_(attention)
    level = slopes.sum(-1, keepdim=True)
    if of_lse is not None:
        # What merges shards may send NaN to a row without keys, whose log-sum-exp is -inf.
        level -= of_lse[chunk.queries].masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    slopes.addcmul_(attention, level, value=-1.0)
    dq = torch.zeros_like(queries)
    for keys, columns, _ in chunk.stretches:
        dq.addmm_(slopes[:, columns], head.rows_of(head.k, keys), alpha=head.factor)
        dk[keys].addmm_(slopes[:, columns].t(), queries, alpha=head.factor)
    return dq
