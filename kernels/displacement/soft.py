"""Soft displacement: the operation, its registration with torch, and its gradient.

Two kernels carry all head modes: the folded product for averaged logits, and one product a head, whose results are
averaged here for averaged probabilities. The results are the same from run to run: no kernel uses atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.grid import FramePairs, TokenGrid
from corrdit.kernels.displacement.folded import folded_backward, folded_forward
from corrdit.kernels.displacement.soft_backward import soft_backward
from corrdit.kernels.displacement.soft_forward import soft_forward
from corrdit.kernels.shared.launch import (
    LOG2_E,
    autocast_off,
    canonical,
    check_device,
    check_tensors,
    float32_precision,
    product_precision,
    unequal_weights,
)
from corrdit.kernels.shared.tables import frame_pairs, window_centers


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
    q: Tensor, k: Tensor, weights: Any, key_mask: Any, center: Any, pairs: Sequence[int], height: int, width: int,
    folded: bool, scale: float, window: int, precision: str,
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
) -> tuple[Tensor, Tensor]:
    """(dq, dk) `[B, H, F*S, D]` in the dtype of q."""
    with float32_precision(precision), autocast_off(q):
        if folded:
            return folded_backward(
                gradient, q, k, weights, displacement, statistics, pairs, height, width, scale, key_mask, center, window
            )
        table = frame_pairs(pairs, q.shape[2] // (height * width), q.device)
        return soft_backward(
            gradient, q, k, displacement, statistics, table, height, width, scale, key_mask, center, window
        )


_soft_displacement_backward = torch.library.custom_op(
    "corrdit::soft_displacement_backward", compute_soft_displacement_backward, mutates_args=()
)


@_soft_displacement_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, weights, key_mask, center, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, weights, key_mask, center, *output)


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk = _soft_displacement_backward(gradient, *ctx.saved_tensors, *ctx.options)
    return dq, dk, *(None,) * 10


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "soft_displacement on Triton kernels is differentiable once; for a second derivative use "
        'backend="reference", whose every step is differentiable'
    )


_soft_displacement.register_autograd(_differentiate, setup_context=_save)
_soft_displacement_backward.register_autograd(_refuse_second_derivative)


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
    """float32 `[B, P, h, w, 2]`, or `[B, H, P, h, w, 2]` for heads="none"; see `corrdit.ops.soft_displacement`.

    Args:
        q, k: `[B, H, F*S, D]` float16, bfloat16 or float32 with any strides, D from 8 to 256.
        weights: `[H]` summing to 1; None for equal weights.
        memory_budget: not used. Beyond outputs and a few numbers for each row the kernels take nothing; the gradient of
            averaged logits takes 64 MiB, float32 sums of one sample's dq and dk, and a sample's keys once more (twice
            with `key_mask`).

    Raises:
        ValueError: a dtype or head_dim the kernels do not take.
        RuntimeError: a device the kernels cannot run on, or a second derivative.
    """
    check_tensors(q, k)
    check_device(q)
    q, logit_scale = canonical(q, scale * temperature)
    folded = heads == "logits" and q.shape[1] > 1
    displacement, _ = _soft_displacement(
        q,
        k,
        unequal_weights(weights) if folded else None,
        key_mask,
        None if center is None else window_centers(center, grid.height, grid.width),
        [frame for pair in pairs for frame in pair],
        grid.height,
        grid.width,
        folded,
        logit_scale * LOG2_E,
        -1 if window is None else min(window, max(grid.height, grid.width)),
        product_precision(),
    )
    displacement = displacement.unflatten(-2, (grid.height, grid.width))
    if heads == "none":
        return displacement
    if heads == "logits":
        return displacement.squeeze(1)
    if weights is None:
        return displacement.mean(1)
    return torch.einsum("bhpyxc,h->bpyxc", displacement, weights.to(torch.float32))
