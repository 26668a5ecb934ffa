"""Attention of chosen tokens on the text and on every frame, by materialised attention rows."""

from __future__ import annotations

from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.reference.scores import frame, logits_between, masked_softmax, reduce_heads


def attention_mass(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor,
    *,
    source: int,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, frames, text_peak, frame_peak); see `corrdit.ops.attention_mass`."""
    queries = frame(q, grid, source)[:, :, tokens]
    logits = logits_between(queries, k, heads=heads, weights=weights, scale=scale)
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    weight = reduce_heads(masked_softmax(logits, allowed), heads, weights)
    text = weight[..., grid.text_slice]
    frames = weight[..., grid.video_slice].unflatten(-1, (grid.frames, grid.tokens_per_frame))
    text_peak = text.amax(-1) if grid.text_tokens else text.sum(-1)
    return text.sum(-1), frames.sum(-1), text_peak, frames.amax(-1)
