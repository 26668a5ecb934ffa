"""Attention without its cross-frame part, by materialised attention maps."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem
from corrdit.reference.scores import log_sum_exp, logits_between, masked_softmax, on_whole_grid, place_in_grid


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
) -> tuple[Tensor, Tensor | None]:
    """(attention in the shape and dtype of q, log-sum-exp `[B, H, tokens of q]` if asked for)."""
    whole_q, k, mask = on_whole_grid(q, k, problem)
    _, v, _ = on_whole_grid(q, v, problem)
    logits = logits_between(whole_q, k, problem)
    allowed = None if mask is None else mask[:, None, None, :]
    local = local_pairs(problem.grid, span, q.device)[None, None]
    if renormalize:
        allowed = local if allowed is None else local & allowed
    weight = masked_softmax(logits, allowed).masked_fill(~local, 0.0)
    attended = torch.einsum("bhqk,bhkd->bhqd", weight, v.to(weight.dtype)).to(q.dtype)
    lse = log_sum_exp(logits, allowed) if problem.with_lse else None
    if problem.queries.selection == "all":
        return attended, lse
    held = place_in_grid(problem.queries, problem.grid).to(q.device)
    return attended[:, :, held], None if lse is None else lse[:, :, held]


def local_pairs(grid: TokenGrid, span: int, device: torch.device) -> Tensor:
    """bool `[N, N]`: text attends to everything, a video token to text and to frames at most `span` away."""
    token_frame = torch.full((grid.tokens,), -1, device=device)
    token_frame[grid.video_slice] = torch.arange(grid.frames, device=device).repeat_interleave(grid.tokens_per_frame)
    is_text = token_frame < 0
    near = (token_frame[:, None] - token_frame[None, :]).abs() <= span
    return near | is_text[:, None] | is_text[None, :]
