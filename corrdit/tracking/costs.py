"""The operation a tracker runs inside the attention: cost rows of some tokens, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid


class ChunkCost(NamedTuple):
    """What one forward pass says about the tokens of its source frame.

    Attributes:
        tokens: int64 `[R]` flat tokens of the source frame, ascending.
        rows: float `[R, L, h, w]` cost of each in every frame of the chunk, in their order.
        back: float `[L, h, w, 2]` for each token of every frame its best token (x, y) in the source frame; None where
            it was not asked for.
    """

    tokens: Tensor
    rows: Tensor
    back: Tensor | None


def cost_operation(
    tokens: Tensor,
    grid_size: tuple[int, int],
    *,
    source: int,
    heads: str,
    head_weights: Sequence[float] | None,
    bidirectional: bool,
    way_back: bool,
    backend: str,
    memory_budget: int | None,
) -> Callable[[Tensor, Tensor, TokenGrid, Tensor | None], tuple[Tensor, Tensor | None]]:
    """An operation for `corrdit.capture` that gives the `rows` and `back` of a `ChunkCost` on the CPU.

    Raises:
        ValueError: when it runs, a token grid of another size than `grid_size`, or weights for another number of heads.
    """

    def operation(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if (grid.height, grid.width) != grid_size:
            raise ValueError(
                f"the transformer has a grid of {grid.height} x {grid.width} tokens a frame, expected {grid_size}"
            )
        q, k, weights = used_heads(q, k, head_weights)
        common: dict[str, Any] = {
            "heads": heads,
            "head_weights": weights,
            "bidirectional": bidirectional,
            "key_mask": key_mask,
            "backend": backend,
            "memory_budget": memory_budget,
        }
        rows = ops.cost_rows(q, k, grid, tokens, source=source, **common)[0].cpu()
        if not way_back:
            return rows, None
        back = [
            ops.match(q, k, grid, source=frame, targets=[source], **common).xy[0, 0] for frame in range(grid.frames)
        ]
        return rows, torch.stack(back).cpu()

    return operation


def used_heads(
    q: Tensor, k: Tensor, head_weights: Sequence[float] | None
) -> tuple[Tensor, Tensor, Sequence[float] | None]:
    """Queries, keys and weights without the heads of weight 0, which would only cost time."""
    if head_weights is None:
        return q, k, None
    if len(head_weights) != q.shape[1]:
        raise ValueError(f"head_weights has {len(head_weights)} weights, but the layer has {q.shape[1]} heads")
    used = [head for head, weight in enumerate(head_weights) if weight != 0]
    if not used:
        raise ValueError("head_weights are all zero; at least one head must count")
    return q[:, used], k[:, used], [head_weights[head] for head in used]
