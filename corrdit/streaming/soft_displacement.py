"""Soft displacement in blocks of score maps, with a backward pass that computes them again."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.streaming.blocks import Block
from corrdit.streaming.frame_pairs import PairPass
from corrdit.streaming.once import Context, first_gradient
from corrdit.streaming.pair_gradients import add_gradients
from corrdit.streaming.products import HeadProducts
from corrdit.streaming.softmax_rows import displacement_of, score_gradient, softmax_rows


def soft_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
    """(displacement `[B, H or 1, R, 2]`, log-sum-exp `[B, H or 1, R]` if asked for).

    Differentiable once in q and k. Nothing but q and k is kept for the backward pass: a block holds whole rows of the
    softmax, so their statistics cost another pass over a tile in the cache, and no memory that grows with the pairs.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        _backward_pass(q, k, problem)  # a budget that only the backward pass would exceed is refused here
    results: tuple[Tensor, Tensor | None] = _SoftDisplacement.apply(q, k, problem)
    return results


class _SoftDisplacement(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
        # The mask and the centres as well: autograd refuses a backward pass after a change of them.
        ctx.save_for_backward(q, k, *problem.limits)
        ctx.problem = problem
        with torch.autocast(q.device.type, enabled=False):
            return _displacement(q, k, problem)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor, of_lse: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        needs_dq, needs_dk, _ = ctx.needs_input_grad

        def gradients(
            q: Tensor, k: Tensor, gradient: Tensor, of_lse: Tensor | None
        ) -> tuple[Tensor | None, Tensor | None]:
            dq = torch.zeros_like(q) if needs_dq else None
            dk = torch.zeros_like(k) if needs_dk else None
            work = _backward_pass(q, k, ctx.problem)
            add_gradients(work, _IncomingSlopes(work, gradient, of_lse), dq, dk)
            return dq, dk

        q, k, *_ = ctx.saved_tensors
        dq, dk = first_gradient("soft_displacement", gradients, q, k, gradient, of_lse)
        return dq, dk, None


def _displacement(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
    work = PairPass(q, k, problem, score_tiles=1, key_matrices=1, purpose="soft displacement")
    products, plan = work.products, work.plan
    shape = (q.shape[0], products.maps if problem.heads == "none" else 1, problem.rows)
    result = torch.zeros((*shape, 2), dtype=products.dtype, device=q.device)
    lse = None
    if problem.with_lse:
        lse = torch.full((*shape, 1), float("-inf"), dtype=products.dtype, device=q.device)
    for batch in range(q.shape[0]):
        for index, weight in enumerate(products.map_weights):
            place = (batch, index if problem.heads == "none" else 0)
            for group in work.groups:
                keys = work.key_matrix(batch, index, group)
                for block in plan.blocks(batch, group.runs):
                    queries = work.query_matrix(batch, index, block)
                    rows = softmax_rows(work, queries, work.block_keys(keys, group, block), block)
                    target = plan.of_block(result[place], block)
                    moved = displacement_of(work, rows, block).transpose(0, 1)
                    target.add_(moved.reshape(target.shape), alpha=weight)
                    if lse is not None and rows.lse is not None:
                        target = plan.of_block(lse[place], block)
                        target.copy_(rows.lse.t().reshape(target.shape))
    return result, None if lse is None else lse.squeeze(-1)


def _backward_pass(q: Tensor, k: Tensor, problem: PairProblem) -> PairPass:
    purpose = "the backward pass of soft displacement"
    products = HeadProducts(q, k, problem)
    frame_sum = 0
    if q.dtype != products.dtype:
        frame_sum = problem.grid.tokens_per_frame * products.copied_width * products.element_bytes
    return PairPass(q, k, problem, score_tiles=2, key_matrices=2, purpose=purpose, reserved_bytes=frame_sum)


class _IncomingSlopes:
    """The gradient of the scores from that of the displacements, which came from outside."""

    def __init__(self, work: PairPass, gradient: Tensor, of_lse: Tensor | None) -> None:
        self.work = work
        self.gradient = gradient.to(work.products.dtype)
        self.of_lse = None if of_lse is None else of_lse.to(work.products.dtype).unsqueeze(-1)

    def of_block(self, batch: int, index: int, queries: Tensor, keys: Tensor, block: Block) -> Tensor:
        work = self.work
        rows = softmax_rows(work, queries, keys, block)
        place = (batch, index if work.problem.heads == "none" else 0)
        incoming = work.rows_of(self.gradient[place], block)
        of_lse = None if self.of_lse is None else work.rows_of(self.of_lse[place], block).squeeze(-1)
        return score_gradient(work, rows, incoming, work.products.map_weights[index], block, of_lse)
