"""The honest plain-PyTorch way for averaged logits: one product over the joined heads, query rows in chunks.

The mean over heads of q_h.k_h is the product of the concatenated heads divided by H, so one map takes the place of H.
Chunks are checkpointed: the backward pass computes them again instead of keeping their maps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from corrdit.grid import TokenGrid

ROWS = 512


def expected_positions(queries: Tensor, keys: Tensor, position: Tensor, frames: int, factor: float) -> Tensor:
    """`[B, rows, F, 2]` of a chunk of queries `[B, rows, H * D]` against all keys."""
    scores = torch.matmul(queries, keys.transpose(-1, -2)).to(position.dtype) * factor
    weight = scores.unflatten(-1, (frames, position.shape[0])).softmax(-1)
    return torch.matmul(weight, position)


def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    temperature: float = 1.0,
    rows: int = ROWS,
    chunk: Callable[..., Tensor] = expected_positions,
) -> Tensor:
    """`[B, F, F, h, w, 2]`; `rows` query tokens at a time, by `expected_positions` or what is compiled of it."""
    factor = temperature * q.shape[-1] ** -0.5 / q.shape[1]
    folded_q, folded_k = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k))  # [B, N, H*D]
    position = grid.coordinates(q.device, torch.promote_types(q.dtype, torch.float32))
    parts = []
    for queries in folded_q.split(rows, dim=1):
        given = (queries, folded_k, position, grid.frames, factor)
        if queries.requires_grad or folded_k.requires_grad:
            parts.append(checkpoint(chunk, *given, use_reentrant=False))
        else:
            parts.append(chunk(*given))
    expected = torch.cat(parts, dim=1).unflatten(1, (grid.frames, grid.tokens_per_frame)).transpose(2, 3)
    return (expected - position).unflatten(-2, (grid.height, grid.width))


def hard_displacement(q: Tensor, k: Tensor, grid: TokenGrid, *, rows: int = ROWS) -> Tensor:
    """The argmax of the same scores: int64 `[B, F, F, h, w, 2]`."""
    folded_q, folded_k = (tensor.transpose(1, 2).flatten(2) for tensor in (q, k))
    best = []
    for queries in folded_q.split(rows, dim=1):
        scores = torch.matmul(queries, folded_k.transpose(-1, -2))
        best.append(scores.unflatten(-1, (grid.frames, grid.tokens_per_frame)).argmax(-1))  # [B, rows, F]
    by_frame = torch.cat(best, dim=1).unflatten(1, (grid.frames, grid.tokens_per_frame)).transpose(2, 3)
    position = grid.coordinates(q.device).long()
    return (position[by_frame] - position).unflatten(-2, (grid.height, grid.width))
