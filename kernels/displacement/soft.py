"""Soft displacement: the operation, its registration with torch, and its gradient.

Two kernels carry all head modes: the folded product for averaged logits, and one product a head, whose results are
averaged here for averaged probabilities. The results are the same from run to run: no kernel uses atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.kernels.displacement.folded import folded_forward, weighted_queries
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
    natural_log_sum_exp,
    refuse_second_derivative,
    taken,
    unequal_weights,
    wanted_gradients,
)
from corrdit.kernels.shared.tables import (
    frame_pairs,
    made_outside,
    pair_places,
    row_count,
    window_centers,
    window_radius,
)
from corrdit.problem import PairProblem, float32_precision


def compute_soft_displacement(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    pairs: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    height: int,
    width: int,
    folded: bool,
    scale: float,
    window: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(displacement `[B, H or 1, R, 2]`, base-2 log-sum-exp `[B, H or 1, R]`), both float32.

    Args:
        pairs: (i0, j0, i1, j1, ...). queries, keys: what q and k hold of every frame, see `TokenAxis.places`.
    """
    table = frame_pairs(pairs, queries, keys, height, width, q.device)
    with float32_precision(precision):
        if folded:
            weighted = weighted_queries(q, weights)
            return folded_forward(weighted.q, k, weighted.common, table, scale, key_mask, center, window)
        return soft_forward(q, k, table, scale, key_mask, center, window)


_soft_displacement = torch.library.custom_op("corrdit::soft_displacement", compute_soft_displacement, mutates_args=())


@_soft_displacement.register_fake
def _(
    q: Tensor, k: Tensor, weights: object, key_mask: object, center: object, pairs: Sequence[int],
    queries: Sequence[int], keys: Sequence[int], height: int, width: int, folded: bool, scale: float, window: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], 1 if folded else q.shape[1], row_count(pairs, queries))
    return q.new_empty(*shape, 2, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def compute_soft_displacement_backward(
    gradient: Tensor | None,
    grad_level: Tensor | None,
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    center: Tensor | None,
    displacement: Tensor,
    statistics: Tensor,
    pairs: Sequence[int],
    queries: Sequence[int],
    keys: Sequence[int],
    height: int,
    width: int,
    folded: bool,
    scale: float,
    window: int,
    precision: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """(dq, dk) in the shapes and dtype of q and k; `[0]` for what is not `wanted`.

    Args:
        gradient, grad_level: of the displacement and of the log-sum-exp; None for one that nothing depends on.
    """
    of_q, of_k = wanted
    table = frame_pairs(pairs, queries, keys, height, width, q.device)
    with float32_precision(precision), autocast_off(q):
        if folded:
            gradients = folded_backward(
                gradient, grad_level, q, k, weights, displacement, statistics, pairs, queries, keys, table, scale,
                key_mask, center, window, (of_q, of_k),
            )  # fmt: skip
        else:
            gradients = soft_backward(
                gradient, grad_level, q, k, displacement, statistics, table, scale, key_mask, center, window,
                (of_q, of_k),
            )  # fmt: skip
    dq, dk = given(gradients, q)
    return dq, dk


_soft_displacement_backward = torch.library.custom_op(
    "corrdit::soft_displacement_backward", compute_soft_displacement_backward, mutates_args=()
)


@_soft_displacement_backward.register_fake
def _(gradient: object, grad_level: object, q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    of_q, of_k = options[-1]
    return q.new_empty(q.shape if of_q else 0), k.new_empty(k.shape if of_k else 0)


def _save(ctx: SavedContext, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, weights, key_mask, center, *ctx.options = inputs
    # The log-sum-exp is often asked for by nobody: its gradient then is None, not zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, weights, key_mask, center, *output)


def _differentiate(ctx: SavedContext, gradient: Tensor | None, grad_level: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = wanted_gradients(ctx, 2)
    if gradient is None and grad_level is None:
        return (None,) * 14
    gradients = _soft_displacement_backward(gradient, grad_level, *ctx.saved_tensors, *ctx.options, wanted)
    return *taken(gradients, wanted), *(None,) * 12


_soft_displacement.register_autograd(_differentiate, setup_context=_save)
_soft_displacement_backward.register_autograd(refuse_second_derivative("soft_displacement"))


def soft_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
    """(displacement `[B, H or 1, R, 2]`, log-sum-exp `[B, H or 1, R]` if asked for), float32.

    See `corrdit.ops.soft_displacement`. The memory budget is not used. Beyond outputs and a few numbers for each row
    the kernels take nothing; averaged logits with weights take a copy of q, and their gradient takes 32 MiB, float32
    sums of one sample's dq and dk, and a sample of q and k once more (k twice with `key_mask`).

    Args:
        q: `[B, H, Nq, D]` float16, bfloat16 or float32 with any strides, D from 8 to 256.
        k: `[B, Hk, Nk, D]`, H a multiple of Hk.
        problem: weights None for equal weights.

    Raises:
        ValueError: a dtype or head_dim the kernels do not take.
        RuntimeError: a device the kernels cannot run on, or a second derivative.
    """
    q, k, problem = kernel_input(q, k, problem)
    weights = problem.weights
    q, logit_scale = canonical(q, problem.factor)
    folded = problem.heads == "logits" and q.shape[1] > 1
    pairs, places = pair_places(problem)
    made_outside(pairs, *places, q)
    displacement, statistics = _soft_displacement(
        q,
        k,
        unequal_weights(weights) if folded else None,
        problem.key_mask,
        window_centers(problem),
        pairs,
        *places,
        folded,
        logit_scale * LOG2_E,
        window_radius(problem),
        problem.precision,
    )
    lse = natural_log_sum_exp(statistics) if problem.with_lse else None
    if problem.heads != "probabilities":
        return displacement, lse
    if weights is None:
        return displacement.mean(1, keepdim=True), lse
    return torch.einsum("bhrc,h->brc", displacement, weights.to(torch.float32)).unsqueeze(1), lse
