"""Soft displacement in blocks of score maps, with a backward pass that computes them again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corrdit.grid import FramePairs, TokenGrid
from corrdit.streaming.blocks import Block, of_rows, take
from corrdit.streaming.frame_pairs import PairPass, PairProblem
from corrdit.streaming.once import first_gradient
from corrdit.streaming.pair_gradients import add_gradients
from corrdit.streaming.products import HeadProducts
from corrdit.streaming.softmax_rows import displacement_of, score_gradient, softmax_rows


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
            work = _backward_pass(q, k, ctx.problem)
            add_gradients(work, _IncomingSlopes(work, gradient), dq, dk)
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
                    rows = softmax_rows(work, queries, work.block_keys(keys, group, block), block)
                    moved = displacement_of(work, rows, block)
                    place = take(target[block.run.pairs], block.queries, grid)
                    place.add_(moved.transpose(0, 1).reshape(place.shape), alpha=weight)
    result = result.unflatten(-2, (grid.height, grid.width))
    return result if separate else result.squeeze(1)


def _backward_pass(q: Tensor, k: Tensor, problem: PairProblem) -> PairPass:
    purpose = "the backward pass of soft displacement"
    products = HeadProducts(q, problem.heads, problem.weights)
    frame_sum = 0
    if q.dtype != products.dtype:
        frame_sum = problem.grid.tokens_per_frame * products.copied_width * products.element_bytes
    return PairPass(q, k, problem, score_tiles=2, key_matrices=2, purpose=purpose, reserved_bytes=frame_sum)


class _IncomingSlopes:
    """The gradient of the scores from that of the displacements, which came from outside."""

    def __init__(self, work: PairPass, gradient: Tensor) -> None:
        self.work = work
        gradient = gradient.to(work.products.dtype).flatten(-3, -2)
        self.gradient = gradient if work.problem.heads == "none" else gradient.unsqueeze(1)

    def of_block(self, batch: int, index: int, queries: Tensor, keys: Tensor, block: Block) -> Tensor:
        work = self.work
        rows = softmax_rows(work, queries, keys, block)
        of_map = self.gradient[batch, index if work.problem.heads == "none" else 0]
        incoming = of_rows(of_map, block, work.grid)
        return score_gradient(work, rows, incoming, work.products.map_weights[index], block)
