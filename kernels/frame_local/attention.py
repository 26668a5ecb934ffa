"""Frame-local attention: the operation, its registration with torch, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.kernels.frame_local.backward import local_backward
from corrdit.kernels.frame_local.forward import local_forward
from corrdit.kernels.frame_local.layout import local_table, stretches, tables_made_outside
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import (
    LOG2_E,
    SavedContext,
    autocast_off,
    canonical,
    given,
    natural_log_sum_exp,
    refuse_second_derivative,
    taken,
    wanted_gradients,
)
from corrdit.problem import PairProblem, float32_precision


def compute_frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    queries: Sequence[int],
    keys: Sequence[int],
    span: int,
    scale: float,
    renormalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(attention `[B, H, Nq, D]`, base-2 log-sum-exp float32 `[B, H, Nq]`).

    Args:
        queries, keys: `stretches` of the two token axes.
    """
    with float32_precision(precision):
        return local_forward(q, k, v, local_table(queries, keys, span, q.device), scale, key_mask, renormalize)


_frame_local_attention = torch.library.custom_op(
    "corrdit::frame_local_attention", compute_frame_local_attention, mutates_args=()
)


@_frame_local_attention.register_fake
def _(q: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def compute_frame_local_attention_backward(
    gradient: Tensor | None,
    grad_level: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    queries: Sequence[int],
    keys: Sequence[int],
    span: int,
    scale: float,
    renormalize: bool,
    precision: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the shapes and dtype of q, k and v; `[0]` for what is not `wanted`.

    Args:
        gradient, grad_level: of the attention and of the log-sum-exp; None for one that nothing depends on.
    """
    tables = local_table(queries, keys, span, q.device), local_table(keys, queries, span, q.device)
    with float32_precision(precision), autocast_off(q):
        gradients = local_backward(
            torch.zeros_like(output) if gradient is None else gradient, grad_level, q, k, v, output, statistics, tables,
            scale, key_mask, renormalize, wanted,
        )  # fmt: skip
    dq, dk, dv = given(gradients, q)
    return dq, dk, dv


_frame_local_attention_backward = torch.library.custom_op(
    "corrdit::frame_local_attention_backward", compute_frame_local_attention_backward, mutates_args=()
)


@_frame_local_attention_backward.register_fake
def _(
    gradient: object, grad_level: object, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        like.new_empty(like.shape if asked else 0) for like, asked in zip((q, k, v), options[-1], strict=True)
    )
    return dq, dk, dv


def _save(ctx: SavedContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, *ctx.options = inputs
    # The log-sum-exp is often asked for by nobody: its gradient then is None, not zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _differentiate(ctx: SavedContext, gradient: Tensor | None, grad_level: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None and grad_level is None:
        return (None,) * 10
    wanted = wanted_gradients(ctx, 3)
    gradients = _frame_local_attention_backward(gradient, grad_level, *ctx.saved_tensors, *ctx.options, wanted)
    return *taken(gradients, wanted), *(None,) * 7


_frame_local_attention.register_autograd(_differentiate, setup_context=_save)
_frame_local_attention_backward.register_autograd(refuse_second_derivative("frame_local_attention"))


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
) -> tuple[Tensor, Tensor | None]:
    """(attention `[B, H, Nq, D]` in the dtype of q, log-sum-exp `[B, H, Nq]` if asked for), differentiable once.

    See `corrdit.ops.frame_local_attention`; arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem, video_only=False)
    q, positive = canonical(q, problem.factor)
    queries, keys = (stretches(axis, problem.grid.frames) for axis in (problem.queries, problem.keys))
    tables_made_outside(queries, keys, span, q)
    attended, statistics = _frame_local_attention(
        q, k, v, problem.key_mask, queries, keys, span, positive * LOG2_E, renormalize, problem.precision
    )
    return attended, natural_log_sum_exp(statistics) if problem.with_lse else None
