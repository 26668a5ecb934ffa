"""Soft displacement: the operation, its registration with torch, and its gradient.

Two kernels carry all head modes: the folded product for averaged logits, and one product a head, whose results are
averaged here for averaged probabilities. The results are the same from run to run: no kernel uses atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.kernels.displacement.folded import folded_forward
from corrdit.kernels.displacement.folded_backward import folded_backward
from corrdit.kernels.displacement.soft_backward import soft_backward
from corrdit.kernels.displacement.soft_forward import soft_forward
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import (
    LOG2_E,
    SavedContext,
    autocast_off,
    canonical,
    given,
    refuse_second_derivative,
    taken,
    unequal_weights,
    wanted_gradients,
)
from corrdit.kernels.shared.tables import frame_pairs, made_outside, window_centers, window_radius
from corrdit.problem import PairProblem, float32_precision


def compute_soft_displacement(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    pairs: Sequence[int],
    height: int,
    width: int,
    folded: bool,
    scale: float,
    window: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(displacement `[B, H or 1, P, S, 2]`, log-sum-exp `[B, H or 1, P, S]`), both float32."""
    table = frame_pairs(pairs, q.shape[2] // (height * width), q.device)
    with float32_precision(precision):
        if folded:
            return folded_forward(q, k, weights, table, height, width, scale, key_mask, center, window)
        return soft_forward(q, k, table, height, width, scale, key_mask, center, window)


_soft_displacement = torch.library.custom_op("corrdit::soft_displacement", compute_soft_displacement, mutates_args=())


@_soft_displacement.register_fake
def _(
    q: Tensor, k: Tensor, weights: object, key_mask: object, center: object, pairs: Sequence[int], height: int,
    width: int, folded: bool, scale: float, window: int, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], 1 if folded else q.shape[1], len(pairs) // 2, height * width)
    return q.new_empty(*shape, 2, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def compute_soft_displacement_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    displacement: Tensor,
    statistics: Tensor,
    pairs: Sequence[int],
    height: int,
    width: int,
    folded: bool,
    scale: float,
    window: int,
    precision: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dq, dk) `[B, H, F*S, D]` in the dtype of q; `[0]` for what is not `wanted`."""
    of_q, of_k = wanted
    with float32_precision(precision), autocast_off(q):
        if folded:
            gradients = folded_backward(
                gradient, q, k, weights, displacement, statistics, pairs, height, width, scale, key_mask, center,
                window, (of_q, of_k),
            )  # fmt: skip
        else:
            table = frame_pairs(pairs, q.shape[2] // (height * width), q.device)
            gradients = soft_backward(
                gradient, q, k, displacement, statistics, table, height, width, scale, key_mask, center, window,
                (of_q, of_k),
            )  # fmt: skip
    dq, dk = given(gradients, q)
    return dq, dk


_soft_displacement_backward = torch.library.custom_op(
    "corrdit::soft_displacement_backward", compute_soft_displacement_backward, mutates_args=()
)


@_soft_displacement_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    of_q, of_k = options[-1]
    return q.new_empty(q.shape if of_q else 0), k.new_empty(k.shape if of_k else 0)


def _save(ctx: SavedContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, weights, key_mask, center, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, weights, key_mask, center, *output)


def _differentiate(ctx: SavedContext, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = wanted_gradients(ctx, 2)
    gradients = _soft_displacement_backward(gradient, *ctx.saved_tensors, *ctx.options, wanted)
    return *taken(gradients, wanted), *(None,) * 10


_soft_displacement.register_autograd(_differentiate, setup_context=_save)
_soft_displacement_backward.register_autograd(refuse_second_derivative("soft_displacement"))


def soft_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, None]:
    """(displacement float32 `[B, H or 1, R, 2]`, None: no log-sum-exp yet); see `corrdit.ops.soft_displacement`.

    The memory budget is not used. Beyond outputs and a few numbers for each row the kernels take nothing; the gradient
    of averaged logits takes 32 MiB, float32 sums of one sample's dq and dk, and a sample of q and k once more (k twice
    with `key_mask`).

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16 or float32 with any strides, D from 8 to 256.
        problem: about every token; weights None for equal weights.

    Raises:
        ValueError: a dtype or head_dim the kernels do not take.
        RuntimeError: a device the kernels cannot run on, or a second derivative.
    """
    q, k, problem = kernel_input(q, k, problem)
    grid, weights = problem.grid, problem.weights
    q, logit_scale = canonical(q, problem.factor)
    folded = problem.heads == "logits" and q.shape[1] > 1
    pairs = [frame for pair in problem.pairs for frame in pair]
    made_outside(pairs, grid.frames, grid.height, grid.width, q)
    displacement, _ = _soft_displacement(
        q,
        k,
        unequal_weights(weights) if folded else None,
        problem.key_mask,
        window_centers(problem),
        pairs,
        grid.height,
        grid.width,
        folded,
        logit_scale * LOG2_E,
        window_radius(problem),
        problem.precision,
    )
    displacement = displacement.flatten(2, 3)
    if problem.heads != "probabilities":
        return displacement, None
    if weights is None:
        return displacement.mean(1, keepdim=True), None
    return torch.einsum("bhrc,h->brc", displacement, weights.to(torch.float32)).unsqueeze(1), None
