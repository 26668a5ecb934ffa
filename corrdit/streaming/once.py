"""Gradients that say clearly that they have no gradient of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Gradients = tuple[Tensor | None, ...]


class _FirstGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, operation: str, compute: Callable[..., Gradients], *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.operation = operation
        with torch.autocast(tensors[0].device.type, enabled=False):
            return compute(*tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.operation} of the streaming backend is differentiable once, and this asks for the gradient of its "
            'gradient; use backend="reference" for second derivatives'
        )


def first_gradient(operation: str, compute: Callable[..., Gradients], *tensors: Tensor) -> Gradients:
    """`compute(*tensors)` with autocast off; a RuntimeError once someone differentiates through the result.

    `torch.autograd.function.once_differentiable` cuts the result off instead, so that a second derivative with respect
    to an input reads "not used in the graph", or is None without a word.
    """
    gradients: Gradients = _FirstGradient.apply(operation, compute, *tensors)
    return gradients
