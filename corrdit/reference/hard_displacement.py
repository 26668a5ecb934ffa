"""Displacement to the best key by materialised score maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import FramePairs, TokenGrid
from corrdit.reference.scores import allowed_keys, frame, logits_between, masked_softmax, reduce_heads


def hard_displacement(
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
    """int64 `[B, P, h, w, 2]`, or `[B, H, P, h, w, 2]` for heads="none"; see `corrdit.ops.hard_displacement`."""
    position = grid.coordinates(q.device).long()
    displacements = []
    for index, (i, j) in enumerate(pairs):
        logits = temperature * logits_between(
            frame(q, grid, i), frame(k, grid, j), heads=heads, weights=weights, scale=scale
        )
        mask = None if key_mask is None else frame(key_mask, grid, j)
        allowed = allowed_keys(grid, mask, window, None if center is None else center[:, index], q.device)
        if heads == "probabilities":
            score = reduce_heads(masked_softmax(logits, allowed), heads, weights)
            allowed = None if allowed is None else allowed.squeeze(1)
        else:
            score = reduce_heads(logits, heads, weights)
            allowed = allowed.squeeze(1) if allowed is not None and heads == "logits" else allowed
        displacements.append(displacement_to_best(score, allowed, position))
    stacked = torch.stack(displacements, dim=2 if heads == "none" else 1)
    return stacked.unflatten(-2, (grid.height, grid.width))


def displacement_to_best(score: Tensor, allowed: Tensor | None, position: Tensor) -> Tensor:
    """`[..., S, 2]` from each query to the first best allowed key of `[..., S, S]`; 0 for a row without keys."""
    if allowed is None:
        return position[score.argmax(-1)] - position
    allowed = allowed.expand_as(score)
    best = score.masked_fill(~allowed, float("-inf")).argmax(-1)
    # A row whose allowed scores are all -inf would otherwise take a removed key of lower index.
    first_allowed = allowed.int().argmax(-1)
    best = torch.where(allowed.gather(-1, best.unsqueeze(-1)).squeeze(-1), best, first_allowed)
    return (position[best] - position) * allowed.any(-1, keepdim=True)
