"""What the kernels read of a problem: video tokens alone where no text takes part, means over heads as one head."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from corrdit.kernels.shared.launch import check_device, check_tensors
from corrdit.problem import PairProblem


def kernel_input(
    q: Tensor, k: Tensor, problem: PairProblem, *, video_only: bool = True
) -> tuple[Tensor, Tensor, PairProblem]:
    """q, k and the problem as the kernels take them.

    heads="features" becomes the one head of "logits" that the means over heads are, three of them for 16-bit inputs,
    which add up to that one, at three times the factor; see `tensor_core_parts`.

    Raises:
        ValueError: a dtype or head_dim the kernels do not take.
        RuntimeError: a device the kernels cannot run on.
    """
    check_tensors(q, k)
    check_device(q)
    if video_only:
        queries, keys = problem.queries.video, problem.keys.video
        mask = None if problem.key_mask is None else problem.key_mask[:, keys]
        q, k = q[:, :, queries], k[:, :, keys]
        problem = replace(problem, grid=problem.grid.without_text(), key_mask=mask)
    if problem.heads == "features":
        weights, dtype = problem.weights, q.dtype
        assert weights is not None
        of_keys = weights.unflatten(0, (k.shape[1], -1)).sum(1)  # a head of k counts for all heads of q that read it
        q, k = (
            torch.einsum("bhnd,h->bnd", tensor.to(weights.dtype), shares).unsqueeze(1)
            for tensor, shares in ((q, weights), (k, of_keys))
        )
        if dtype != q.dtype:
            q, k = tensor_core_parts(q, k, dtype)
            # Their mean is a third of their sum. Three times q may not fit float16.
            problem = replace(problem, factor=q.shape[1] * problem.factor)
        equal = torch.full((1,), 1 / q.shape[1], dtype=weights.dtype, device=q.device).expand(q.shape[1])
        problem = replace(problem, heads="logits", weights=equal)
    return q, k, problem


def tensor_core_parts(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three heads of a 16-bit dtype whose sum of q.k is that of the one float32 head, as exact and on tensor cores.

    With q = q_high + q_low the sum of the roundings to `dtype` and of what they leave, q.k is
    q_high.k_high + q_high.k_low + q_low.k_high up to the square of a rounding. One rounding alone costs up to 0.25
    tokens of displacement in bfloat16 where the attention is sharp (logits of 3 x 3 standard deviations over 15 x 20
    tokens), the three parts 4e-4, what is lost to float16 softmax weights anyway.

    Args:
        q, k: float32 `[B, 1, N, D]`.

    Returns:
        `[B, 3, N, D]` in `dtype`. The gradient of each input is that of its rounding, which stands for the whole.
    """
    highs, lows = [], []
    for tensor in (q, k):
        highs.append(tensor.to(dtype))
        lows.append((tensor - highs[-1].to(tensor.dtype)).detach().to(dtype))
    return torch.cat((highs[0], highs[0], lows[0]), 1), torch.cat((highs[1], lows[1], highs[1]), 1)
