"""Attention of chosen tokens on the text and on every frame, by materialised attention rows."""

from __future__ import annotations

from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.reference.scores import frame, logits_between, masked_softmax, on_whole_grid, reduce_heads


def attention_mass(
    q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, frames, text peak, frame peak), `[B, H or 1, P]` and `[B, H or 1, P, F]`."""
    grid = problem.grid
    q, k, mask = on_whole_grid(q, k, problem)
    logits = logits_between(frame(q, grid, source)[:, :, tokens], k, problem)
    weight = reduce_heads(masked_softmax(logits, None if mask is None else mask[:, None, None, :]), problem)
    text = weight[..., grid.text_slice]
    frames = weight[..., grid.video_slice].unflatten(-1, (grid.frames, grid.tokens_per_frame))
    text_peak = text.amax(-1) if grid.text_tokens else text.sum(-1)
    return text.sum(-1), frames.sum(-1), text_peak, frames.amax(-1)
