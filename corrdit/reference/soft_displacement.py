"""Soft displacement by materialised score maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import FramePairs, TokenGrid
from corrdit.reference.scores import allowed_keys, frame, logits_between, masked_softmax, reduce_heads


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
    """`[B, P, h, w, 2]`, or `[B, H, P, h, w, 2]` for heads="none"; see `corrdit.ops.soft_displacement`."""
    displacements = []
    for index, (i, j) in enumerate(pairs):
        logits = logits_between(frame(q, grid, i), frame(k, grid, j), heads=heads, weights=weights, scale=scale)
        mask = None if key_mask is None else frame(key_mask, grid, j)
        allowed = allowed_keys(grid, mask, window, None if center is None else center[:, index], q.device)
        probability = masked_softmax(temperature * logits, allowed)
        position = grid.coordinates(q.device, probability.dtype)
        # sum_p' P[p, p'] (p' - p), written so that a row without keys gives 0.
        moved = probability @ position - probability.sum(-1, keepdim=True) * position
        displacements.append(reduce_heads(moved, heads, weights))
    stacked = torch.stack(displacements, dim=2 if heads == "none" else 1)
    return stacked.unflatten(-2, (grid.height, grid.width))
