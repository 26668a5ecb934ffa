"""Frame-local attention: the operation, its registration with torch, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.kernels.frame_local.backward import local_backward
from corrdit.kernels.frame_local.forward import LocalLayout, local_forward
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import (
    LOG2_E,
    SavedContext,
    autocast_off,
    canonical,
    given,
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
    layout: Sequence[int],
    scale: float,
    renormalize: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(attention `[B, H, N, D]`, log-sum-exp float32 `[B, H, N]`)."""
    with float32_precision(precision):
        return local_forward(q, k, v, LocalLayout(*layout), scale, key_mask, renormalize)


_frame_local_attention = torch.library.custom_op(
    "corrdit::frame_local_attention", compute_frame_local_attention, mutates_args=()
)


@_frame_local_attention.register_fake
def _(q: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def compute_frame_local_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    output: Tensor,
    statistics: Tensor,
    layout: Sequence[int],
    scale: float,
    renormalize: bool,
    precision: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) `[B, H, N, D]` in the dtype of q; `[0]` for what is not `wanted`."""
    of_q, of_keys = wanted
    with float32_precision(precision), autocast_off(q):
        gradients = local_backward(
            gradient, q, k, v, output, statistics, LocalLayout(*layout), scale, key_mask, renormalize, (of_q, of_keys)
        )
    dq, dk, dv = given(gradients, q)
    return dq, dk, dv


_frame_local_attention_backward = torch.library.custom_op(
    "corrdit::frame_local_attention_backward", compute_frame_local_attention_backward, mutates_args=()
)


@_frame_local_attention_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_keys = options[-1]
    return (
        q.new_empty(q.shape if of_q else 0),
        k.new_empty(k.shape if of_keys else 0),
        v.new_empty(v.shape if of_keys else 0),
    )


def _save(ctx: SavedContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _differentiate(ctx: SavedContext, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    of_q, of_k, of_v = wanted_gradients(ctx, 3)
    # One kernel makes dk and dv.
    wanted = [of_q, of_k or of_v]
    gradients = _frame_local_attention_backward(gradient, *ctx.saved_tensors, *ctx.options, wanted)
    return *taken(gradients, [of_q, of_k, of_v]), *(None,) * 5


_frame_local_attention.register_autograd(_differentiate, setup_context=_save)
_frame_local_attention_backward.register_autograd(refuse_second_derivative("frame_local_attention"))


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
) -> tuple[Tensor, None]:
    """(attention `[B, H, N, D]` in the dtype of q, differentiable once; None: no log-sum-exp yet).

    See `corrdit.ops.frame_local_attention`; arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem, video_only=False)
    q, positive = canonical(q, problem.factor)
    layout = list(LocalLayout.of(problem.grid, span))
    attended, _ = _frame_local_attention(
        q, k, v, problem.key_mask, layout, positive * LOG2_E, renormalize, problem.precision
    )
    return attended, None
