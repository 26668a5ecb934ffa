"""Soft displacement in blocks of score maps, with a backward pass that computes them again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corrdit.grid import FramePairs, TokenGrid
from corrdit.streaming.blocks import Block, KeyGroup, take
from corrdit.streaming.frame_pairs import LOG2_E, PairPass, PairProblem
from corrdit.streaming.once import first_gradient
from corrdit.streaming.products import HeadProducts


def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    pairs: FramePairs,
    *,
    heads: str,
    weights: Tensor | None,
    scale: float,
    temperature: float,
    key_mask: Tensor | None,
    window: int | None,
    center: Tensor | None,
    memory_budget: int | None = None,
) -> Tensor:
    """`[B, P, h, w, 2]`, or `[B, H, P, h, w, 2]` for heads="none"; see `corrdit.ops.soft_displacement`.

    Differentiable once in q and k. Nothing but q and k is kept for the backward pass: a block holds whole rows of the
    softmax, so their statistics cost another pass over a tile in the cache, and no memory that grows with the pairs.
    """
    problem = PairProblem(grid, pairs, heads, weights, scale * temperature, key_mask, window, center, memory_budget)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        _backward_pass(q, k, problem)  # a budget that only the backward pass would exceed is refused here
    displacement: Tensor = _SoftDisplacement.apply(q, k, problem)
    return displacement


class _SoftDisplacement(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.problem = problem
        with torch.autocast(q.device.type, enabled=False):
            return _displacement(q, k, problem)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_dq, needs_dk, _ = ctx.needs_input_grad

        def gradients(q: Tensor, k: Tensor, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
            dq = torch.zeros_like(q) if needs_dq else None
            dk = torch.zeros_like(k) if needs_dk else None
            _add_gradients(q, k, ctx.problem, gradient, dq, dk)
            return dq, dk

        dq, dk = first_gradient("soft_displacement", gradients, *ctx.saved_tensors, gradient)
        return dq, dk, None


def _displacement(q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
    work = PairPass(q, k, problem, score_tiles=1, key_matrices=1, purpose="soft displacement")
    grid, products = work.grid, work.products
    separate = problem.heads == "none"
    shape = (q.shape[0], products.maps if separate else 1, len(problem.pairs), grid.tokens_per_frame, 2)
    result = torch.zeros(shape, dtype=products.dtype, device=q.device)
    for batch in range(q.shape[0]):
        for index, weight in enumerate(products.map_weights):
            target = result[batch, index if separate else 0]
            for group in work.groups:
                keys = work.key_matrix(batch, index, group)
                for block in work.plan.blocks(batch, group.runs):
                    queries = work.query_matrix(batch, index, block)
                    scores = work.scores(queries, work.block_keys(keys, group, block), block, problem.factor * LOG2_E)
                    inverse, expected = _expected_position(work, work.exponentials(scores), block)
                    moved = expected - block.own
                    if work.plan.may_leave_rows_empty:
                        moved.masked_fill_((inverse == 0).unsqueeze(-1), 0.0)
                    pairs = slice(block.run.pair, block.run.pair + block.run.key_frames)
                    place = take(target[pairs], block.queries, grid)
                    place.add_(moved.transpose(0, 1).reshape(place.shape), alpha=weight)
    result = result.unflatten(-2, (grid.height, grid.width))
    return result if separate else result.squeeze(1)


def _expected_position(work: PairPass, exponentials: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Reciprocal row sums `[n, frames]`, 0 for rows without keys, and mean positions `[n, frames, 2]` of the keys."""
    rows, frames, keys = exponentials.shape
    # One product gives the row sums and both coordinates; this way round it is three times faster on a CPU.
    sums = torch.mm(block.table.sums, exponentials.view(-1, keys).t()).view(3, rows, frames)
    inverse = sums[0].reciprocal()
    if work.plan.may_leave_rows_empty:
        inverse.masked_fill_(sums[0] == 0, 0.0)
    return inverse, (sums[1:] * inverse).permute(1, 2, 0)


def _backward_pass(q: Tensor, k: Tensor, problem: PairProblem) -> PairPass:
    purpose = "the backward pass of soft displacement"
    products = HeadProducts(q, problem.heads, problem.weights)
    frame_sum = 0
    if q.dtype != products.dtype:
        frame_sum = problem.grid.tokens_per_frame * products.copied_width * products.element_bytes
    return PairPass(q, k, problem, score_tiles=2, key_matrices=2, purpose=purpose, reserved_bytes=frame_sum)


def _add_gradients(
    q: Tensor, k: Tensor, problem: PairProblem, gradient: Tensor, dq: Tensor | None, dk: Tensor | None
) -> None:
    work = _backward_pass(q, k, problem)
    slopes = _Slopes(work, gradient)
    for batch in range(q.shape[0]):
        for index in range(work.products.maps):
            if dq is None or dq.dtype == work.products.dtype:
                _add_key_and_query_gradients(work, slopes, batch, index, dq, dk)
                continue
            # Gradients in half precision are summed in float32 and rounded once. Those of the keys are complete when
            # their group is; those of the queries would be at the very end only, so they get a pass of their own.
            if dk is not None:
                _add_key_and_query_gradients(work, slopes, batch, index, None, dk)
            for frame in sorted({i for i, _ in problem.pairs}):
                _store_frame_gradient(work, slopes, batch, index, dq, frame)


class _Slopes:
    """The gradient with respect to the scores of a block."""

    def __init__(self, work: PairPass, gradient: Tensor) -> None:
        self.work = work
        gradient = gradient.to(work.products.dtype).flatten(-3, -2)
        self.gradient = gradient if work.problem.heads == "none" else gradient.unsqueeze(1)

    def of_block(self, batch: int, index: int, queries: Tensor, keys: Tensor, block: Block) -> Tensor:
        """`[n, keys]`: factor * P * (g . (position - expected position))."""
        work, run = self.work, block.run
        scores = work.scores(queries, keys, block, work.problem.factor * LOG2_E)
        exponentials = work.exponentials(scores)
        inverse, expected = _expected_position(work, exponentials, block)
        of_map = self.gradient[batch, index if work.problem.heads == "none" else 0]
        incoming = take(of_map[run.pair : run.pair + run.key_frames], block.queries, work.grid)
        incoming = incoming.reshape(run.key_frames, -1, 2).transpose(0, 1)
        factor = work.problem.factor * work.products.map_weights[index]
        pull = incoming * (inverse * factor).unsqueeze(-1)
        level = (pull * expected).sum(-1)
        columns, rows = block.table.columns, block.table.rows
        along_row = (pull[..., :1] * columns).unsqueeze(-2)
        along_column = (pull[..., 1:] * rows - level.unsqueeze(-1)).unsqueeze(-1)
        flat = work.tile(1, queries.shape[0], keys.shape[0])
        torch.add(along_row, along_column, out=flat.view(*scores.shape[:2], len(rows), len(columns)))
        return flat.mul_(exponentials.view_as(flat))


def _add_key_and_query_gradients(
    work: PairPass, slopes: _Slopes, batch: int, index: int, dq: Tensor | None, dk: Tensor | None
) -> None:
    """Adds to `dq`, which has the working dtype, and writes `dk`, which may have any; one pass over the blocks."""
    products = work.products
    for group in work.groups:
        keys = work.key_matrix(batch, index, group)
        total = None if dk is None else torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
        for block in work.plan.blocks(batch, group.runs):
            queries = work.query_matrix(batch, index, block)
            block_keys = work.block_keys(keys, group, block)
            slope = slopes.of_block(batch, index, queries, block_keys, block)
            if total is not None:
                _add_key_gradient(work, total, group, block, slope, queries)
            if dq is not None:
                products.add_query_gradient(work.query_part(dq, batch, index, block), torch.mm(slope, block_keys))
        if dk is not None:
            place = products.heads_of(dk[batch], index)[:, work.group_tokens(group)]
            products.store_key_gradient(place, total)


def _add_key_gradient(
    work: PairPass, total: Tensor, group: KeyGroup, block: Block, slope: Tensor, queries: Tensor
) -> None:
    place = work.part_of_group(total, group, block)
    if place.ndim == 2:
        place.addmm_(slope.t(), queries)
    else:
        place.add_(torch.mm(slope.t(), queries).view(place.shape))


def _store_frame_gradient(work: PairPass, slopes: _Slopes, batch: int, index: int, dq: Tensor, frame: int) -> None:
    """Sums the gradient of one query frame over all its pairs in the working dtype, then writes it to `dq`."""
    grid, products = work.grid, work.products
    target = products.heads_of(dq[batch], index)[:, grid.frame_slice(frame)]
    total = torch.zeros(target.shape, dtype=products.dtype, device=dq.device)
    for group in work.groups:
        runs = [run for run in group.runs if run.query_frame == frame]
        keys = work.key_matrix(batch, index, group) if runs else None
        for block in work.plan.blocks(batch, runs):
            block_keys = work.block_keys(keys, group, block)
            slope = slopes.of_block(batch, index, work.query_matrix(batch, index, block), block_keys, block)
            products.add_query_gradient(take(total, block.queries, grid), torch.mm(slope, block_keys))
    target.copy_(total)
