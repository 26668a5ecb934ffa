"""Gradients that say clearly that they have no gradient of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corrdit.problem import PairProblem

Gradients = tuple[Tensor | None, ...]


class Context(FunctionCtx):
    """What `torch.autograd.Function` hands to its passes, with the attributes that it has in fact."""

    problem: PairProblem
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _Operation(FunctionCtx):
    operation: str


class _FirstGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Operation, operation: str, compute: Callable[..., Gradients], *tensors: Tensor) -> Gradients:
        ctx.operation = operation
        with torch.autocast(tensors[0].device.type, enabled=False):
            return compute(*tensors)

    @staticmethod
    def backward(ctx: _Operation, *_: object) -> Gradients:
        raise RuntimeError(
            f"{ctx.operation} of the streaming backend is differentiable once, and this asks for the gradient of its "
            'gradient; use backend="reference" for second derivatives'
        )


def first_gradient(operation: str, compute: Callable[..., Gradients], *tensors: Tensor | None) -> Gradients:
    """`compute(*tensors)` with autocast off; a RuntimeError once someone differentiates through the result.

    `torch.autograd.function.once_differentiable` cuts the result off instead, so that a second derivative with respect
    to an input reads "not used in the graph", or is None without a word.
    """
    gradients: Gradients = _FirstGradient.apply(operation, compute, *tensors)
    return gradients
