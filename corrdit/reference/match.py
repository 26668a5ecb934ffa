"""Matching by materialised cost maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.reference.scores import frame, logits_between, masked_softmax, reduce_heads, window_mask


def match(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    source: int,
    targets: list[int],
    *,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
    refine: int,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(xy `[B, (H,) Ft, h, w, 2]`, score `[B, (H,) Ft, h, w]`); see `corrdit.ops.match`."""
    positions, scores = [], []
    for target in targets:
        cost = cost_map(
            q, k, grid, source, target,
            heads=heads, weights=weights, scale=scale, key_mask=key_mask, bidirectional=bidirectional,
        )  # fmt: skip
        score, best = cost.max(-1)
        positions.append(refined_position(cost, best, grid, refine))
        scores.append(score)
    frame_axis = 2 if heads == "none" else 1
    xy = torch.stack(positions, frame_axis).unflatten(-2, (grid.height, grid.width))
    return xy, torch.stack(scores, frame_axis).unflatten(-1, (grid.height, grid.width))


def cost_map(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    source: int,
    target: int,
    *,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    bidirectional: bool,
) -> Tensor:
    """C `[B, (H,) S source, S target]`: the forward softmax, or its mean with the transposed backward softmax."""
    forward = _frame_probability(q, k, grid, source, target, heads, weights, scale, key_mask)
    if not bidirectional:
        return forward
    backward = _frame_probability(q, k, grid, target, source, heads, weights, scale, key_mask)
    return (forward + backward.transpose(-1, -2)) / 2


def _frame_probability(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    query_frame: int,
    key_frame: int,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    logits = logits_between(
        frame(q, grid, query_frame), frame(k, grid, key_frame), heads=heads, weights=weights, scale=scale
    )
    allowed = None if key_mask is None else frame(key_mask, grid, key_frame)[:, None, None, :]
    return reduce_heads(masked_softmax(logits, allowed), heads, weights)


def refined_position(cost: Tensor, best: Tensor, grid: TokenGrid, refine: int) -> Tensor:
    """`[..., S, 2]` position of the best key, or the cost-weighted mean of positions within `refine` tokens of it."""
    position = grid.coordinates(cost.device, cost.dtype)
    if refine == 0:
        return position[best]
    near = window_mask(grid, refine, None, cost.device)[0, 0][best]
    weight = torch.where(near, cost, torch.zeros_like(cost))
    total = weight.sum(-1, keepdim=True)
    # Without any weight (every key removed) the mean is not defined and the best key stands.
    return torch.where(total == 0, position[best], weight @ position / total)
