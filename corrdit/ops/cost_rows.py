"""Cost maps of chosen tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from corrdit.arguments import flag
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import BackendInput, backend_input, full_precision, select_backend


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

    Returns:
        `[B, P, F, h, w]`, the source frame included, float32 (float64 for float64 input); with heads="none" a head axis
        after the batch. Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.check_tokens(grid, q=q, k=k)
    weights = checks.check_heads(heads, head_weights, q)
    source = checks.check_frame("source", source, grid)
    key_mask = checks.check_key_mask(key_mask, q)
    module = select_backend(backend, q)
    given = backend_input(module, BackendInput(q, k, grid, key_mask, heads, weights))
    with full_precision(q):
        rows: Tensor = module.cost_rows(
            given.q,
            given.k,
            given.grid,
            checks.check_frame_tokens(tokens, grid, q.device),
            source=source,
            heads=given.heads,
            weights=given.weights,
            scale=checks.check_scale(scale, q.shape[-1]),
            key_mask=given.key_mask,
            bidirectional=flag("bidirectional", bidirectional),
            memory_budget=checks.check_budget(memory_budget),
        )
    return rows
