"""Squared error of the soft displacement against a reference, with its gradients from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.streaming.blocks import Block
from corrdit.streaming.frame_pairs import PairPass
from corrdit.streaming.once import Context, first_gradient
from corrdit.streaming.pair_gradients import add_gradients
from corrdit.streaming.softmax_rows import displacement_of, score_gradient, softmax_rows


def soft_displacement_error(
    q: Tensor, k: Tensor, problem: PairProblem, reference: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """`(weights * (soft_displacement(q, k, problem) - reference).square()).sum()`, a scalar, with its gradients.

    The squared error is a sum over rows of the softmax, so the gradient of a row is known as soon as its displacement
    is: three matrix products a block, where a displacement and a gradient that comes back later take four. That of a
    loss of cross entropy is found in the same way (Liger-Kernel, arXiv 2410.10989, fused linear cross entropy).

    Differentiable once in q and k; the gradients are kept from the forward to the backward pass, in float32 (float64
    for float64 input), so that a gradient that comes in at any scale is multiplied before it is rounded. Worth its
    while only where a gradient is wanted.

    Args:
        problem: of any `heads` but "probabilities": a displacement comes from one map, so that its error is known with
            the map's row. Its memory budget is that beyond inputs and gradients.
        reference: of any dtype, `[B, H or 1, R, 2]`.
        weights: of the vectors, bool or float `[B, H or 1, R, 1]`; None for 1.
    """
    error: Tensor = _Error.apply(q, k, problem, reference.detach(), weights)
    return error


class _Error(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, problem: PairProblem, reference: Tensor, weights: Tensor | None
    ) -> Tensor:
        needs_dq, needs_dk, *_ = ctx.needs_input_grad
        with torch.autocast(q.device.type, enabled=False):
            work = PairPass(q, k, problem, score_tiles=2, key_matrices=2, purpose="the loss of soft displacement")
            dtype = work.products.dtype
            dq = torch.zeros_like(q, dtype=dtype) if needs_dq else None
            dk = torch.zeros_like(k, dtype=dtype) if needs_dk else None
            slopes = _ErrorSlopes(work, reference, weights)
            add_gradients(work, slopes, dq, dk)
        ctx.save_for_backward(q, k, *(whole for whole in (dq, dk) if whole is not None))
        return slopes.errors.sum()

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        q, k, *kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]

        def scaled(q: Tensor, k: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            wanted = iter(kept)
            return tuple((next(wanted) * gradient).to(q.dtype) if needed else None for needed in needs)

        dq, dk = first_gradient("the loss of soft_displacement", scaled, q, k, gradient)
        return dq, dk, None, None, None


class _ErrorSlopes:
    """The gradient of the scores from the squared error of their own displacements.

    Attributes:
        errors: `[B, maps, P]` squared errors of the blocks visited.
    """

    def __init__(self, work: PairPass, reference: Tensor, weights: Tensor | None) -> None:
        self.work, self.reference, self.weights = work, reference, weights
        shape = (*reference.shape[:2], len(work.problem.pairs))
        self.errors = torch.zeros(shape, dtype=work.products.dtype, device=work.q.device)

    def of_block(self, batch: int, index: int, queries: Tensor, keys: Tensor, block: Block) -> Tensor:
        work = self.work
        rows = softmax_rows(work, queries, keys, block)
        wanted = work.rows_of(self.reference[batch, index], block)
        error = displacement_of(work, rows, block).sub_(wanted.to(work.products.dtype))
        squared = error.square()
        if self.weights is not None:
            counted = work.rows_of(self.weights[batch, index], block).to(error.dtype)
            squared.mul_(counted)
            error.mul_(counted)
        self.errors[batch, index, block.run.pairs] += squared.sum((0, 2))
        return score_gradient(work, rows, error.mul_(2), 1.0, block)
