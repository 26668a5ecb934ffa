"""Attention without its cross-frame part, by materialised attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.reference.scores import masked_softmax, working_dtype


def frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    key_mask: Tensor | None,
    renormalize: bool,
    span: int,
    memory_budget: int | None = None,
) -> Tensor:
    """`[B, H, N, D]`; see `corrdit.ops.frame_local_attention`."""
    dtype = working_dtype(q)
    logits = scale * torch.einsum("bhqd,bhkd->bhqk", q.to(dtype), k.to(dtype))
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    local = local_pairs(grid, span, q.device)[None, None]
    if renormalize:
        weight = masked_softmax(logits, local if allowed is None else local & allowed)
    else:
        weight = masked_softmax(logits, allowed).masked_fill(~local, 0.0)
    return torch.einsum("bhqk,bhkd->bhqd", weight, v.to(dtype)).to(q.dtype)


def local_pairs(grid: TokenGrid, span: int, device: torch.device) -> Tensor:
    """bool `[N, N]`: text attends to everything, a video token to text and to frames at most `span` away."""
    token_frame = torch.full((grid.tokens,), -1, device=device)
    token_frame[grid.video_slice] = torch.arange(grid.frames, device=device).repeat_interleave(grid.tokens_per_frame)
    is_text = token_frame < 0
    near = (token_frame[:, None] - token_frame[None, :]).abs() <= span
    return near | is_text[:, None] | is_text[None, :]
