"""Attention without its cross-frame part, by materialised attention maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem, working_dtype
from corrdit.reference.scores import log_sum_exp, logits_between, masked_softmax, on_whole_grid, place_in_grid


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
) -> tuple[Tensor, Tensor | None]:
    """(attention in the shape and dtype of q, log-sum-exp `[B, H, tokens of q]` if asked for)."""
    whole_q, k, mask = on_whole_grid(q, k, problem)
    _, v, _ = on_whole_grid(q, v, problem)
    dtype = working_dtype(q.dtype)
    attended = torch.zeros_like(whole_q)
    lse = torch.zeros(whole_q.shape[:3], dtype=dtype, device=q.device) if problem.with_lse else None
    for rows, seen in local_keys(problem.grid, span):
        # Only what takes part is multiplied: 0 times a NaN of a token that these queries do not see would be NaN.
        inside = seen if renormalize else [slice(None)]
        logits = logits_between(whole_q[:, :, rows], _joined(k, inside, 2), problem)
        allowed = None if mask is None else _joined(mask, inside, 1)[:, None, None]
        weight = masked_softmax(logits, allowed)
        if not renormalize:
            weight = _joined(weight, seen, 3)
        values = _joined(v, seen, 2).to(weight.dtype)
        attended[:, :, rows] = torch.einsum("bhqk,bhkd->bhqd", weight, values).to(q.dtype)
        if lse is not None:
            lse[:, :, rows] = log_sum_exp(logits, allowed)
    if problem.queries.selection == "all":
        return attended, lse
    held = place_in_grid(problem.queries, problem.grid).to(q.device)
    return attended[:, :, held], None if lse is None else lse[:, :, held]


def local_keys(grid: TokenGrid, span: int) -> Iterator[tuple[slice, list[slice]]]:
    """Query tokens, and where the keys stand that they see: text sees everything, a frame text and frames near it."""
    if grid.text_tokens:
        yield grid.text_slice, [slice(None)]
    for frame_number in range(grid.frames):
        first = grid.frame_slice(max(frame_number - span, 0))
        last = grid.frame_slice(min(frame_number + span, grid.frames - 1))
        near = slice(first.start, last.stop)
        yield grid.frame_slice(frame_number), [grid.text_slice, near] if grid.text_first else [near, grid.text_slice]


def _joined(tensor: Tensor, parts: list[slice], dim: int) -> Tensor:
    return torch.cat([tensor[(slice(None),) * dim + (part,)] for part in parts], dim)
