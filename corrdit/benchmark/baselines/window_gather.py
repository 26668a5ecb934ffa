"""Windowed soft displacement by gathering every query's window of keys, as FastVMT does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from corrdit.grid import TokenGrid

ROWS = 256


def soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, window: int, temperature: float = 1.0, rows: int = ROWS
) -> Tensor:
    """heads="logits", windows round each query's own place: `[B, F, F, h, w, 2]`."""
    factor = temperature * q.shape[-1] ** -0.5 / q.shape[1]
    folded_q, folded_k = (
        tensor.transpose(1, 2).flatten(2).unflatten(1, (grid.frames, grid.tokens_per_frame)) for tensor in (q, k)
    )
    position = grid.coordinates(q.device).long()
    steps = torch.arange(-window, window + 1, device=q.device)
    step = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)  # [(2r+1)^2, 2]
    place = position[:, None] + step  # [S, K, 2]
    inside = ((place >= 0) & (place < place.new_tensor([grid.width, grid.height]))).all(-1)
    index = place[..., 1].clamp(0, grid.height - 1) * grid.width + place[..., 0].clamp(0, grid.width - 1)

    def chunk(queries: Tensor, keys: Tensor, part: slice) -> Tensor:
        scores = torch.einsum("bpd,bpkd->bpk", queries, keys[:, index[part]]).float() * factor
        weight = scores.masked_fill(~inside[part], float("-inf")).softmax(-1)
        return torch.einsum("bpk,kc->bpc", weight, step.to(weight.dtype))

    flows = []
    for i in range(grid.frames):
        for j in range(grid.frames):
            parts = [
                checkpoint(chunk, folded_q[:, i, part], folded_k[:, j], part, use_reentrant=False)
                for part in (slice(s, s + rows) for s in range(0, grid.tokens_per_frame, rows))
            ]
            flows.append(torch.cat(parts, dim=1))
    flow = torch.stack(flows, dim=1).unflatten(1, (grid.frames, grid.frames))
    return flow.unflatten(-2, (grid.height, grid.width))
