"""Cost maps of chosen tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from corrdit.arguments import flag
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend


@torch.no_grad()
def cost_rows(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor | Iterable[int],
    *,
    source: int = 0,
    heads: str = "probabilities",
    head_weights: Tensor | Iterable[float] | None = None,
    bidirectional: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Rows of the cost of `corrdit.ops.match` for chosen tokens of the source frame, in every frame.

    For pictures, for tracking a few points at a cost that grows with their number, and for averaging the maps of
    overlapping chunks. With `bidirectional` that cost has a part which does not: `P_backward[p', p]` is normalised over
    all tokens of the source frame, so the log-sum-exp of every token p' of every frame is computed once (the work of
    one `match` pass over the frames, no more memory than `[H, F*S]` numbers) however few rows are asked for, and no row
    can do without it. `bidirectional=False` has none. Source: DiffTrack (arXiv 2506.17220), query-key matching.

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16, float32 or float64. Text tokens take no part.
        grid: how the N tokens are arranged.
        tokens: P flat indices `row * width + column` within the source frame.
        source: the frame the tokens lie in.
        heads, head_weights, bidirectional, scale, key_mask, backend, memory_budget: as in `corrdit.ops.match`.
        queries, query_frames, keys: what q and k hold if not the whole axis, and fewer key heads; see `corrdit.ops`.
            q must hold the tokens, and all of every frame with `bidirectional`.

    Returns:
        `[B, P, F, h, w]`, the source frame included, float32 (float64 for float64 input); with heads="none" a head axis
        after the batch. Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    problem = checks.checked_problem(
        q, k, None, grid, heads=heads, head_weights=head_weights, scale=scale, key_mask=key_mask, queries=queries,
        query_frames=query_frames, keys=keys, memory_budget=memory_budget,
    )  # fmt: skip
    source = checks.check_frame("source", source, grid)
    problem = replace(problem, pairs=[(source, frame) for frame in range(grid.frames)])
    chosen = checks.check_frame_tokens(tokens, problem, source, q.device)
    if flag("bidirectional", bidirectional):
        checks.check_both_directions(problem)
    q, k, problem = problem.of_read_heads(q, k)
    with full_precision(q):
        implementation = select_backend(backend, q, problem)
        rows = implementation.cost_rows(q, k, problem, chosen, bidirectional=bool(bidirectional))
    rows = rows.unflatten(-1, (grid.height, grid.width))
    return rows if heads == "none" else rows.squeeze(1)
