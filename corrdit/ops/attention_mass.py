"""How much attention chosen tokens pay to the text and to every frame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend


class AttentionMass(NamedTuple):
    """Attention of P tokens, from the softmax over text and all frames.

    Attributes:
        text: `[B, P]` summed weight on the text.
        frames: `[B, P, F]` summed weight on each frame.
        text_peak: `[B, P]` largest single weight in the text; 0 without text.
        frame_peak: `[B, P, F]` largest single weight in each frame.
    """

    text: Tensor
    frames: Tensor
    text_peak: Tensor
    frame_peak: Tensor


@torch.no_grad()
def attention_mass(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor | Iterable[int],
    *,
    source: int = 0,
    heads: str = "probabilities",
    head_weights: Tensor | Iterable[float] | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> AttentionMass:
    """Sum and peak of the attention of chosen tokens on the text and on each frame.

    Source: DiffTrack (arXiv 2506.17220), attention score (sums) and confidence score (peaks).

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16, float32 or float64, text tokens included.
        grid: how the N tokens are arranged.
        tokens: P flat indices `row * width + column` within the source frame.
        source: the frame the tokens lie in.
        heads: what is averaged over heads: "probabilities", "logits", "features", or "none" to keep the heads apart. A
            peak is the peak of the average.
        head_weights: `[H]` non-negative weights of the heads in that average, normalised to sum 1.
        scale: factor of q.k, `D ** -0.5` by default.
        key_mask: bool `[B, N]`, True = may be attended. A token without any key has weight 0 everywhere.
        queries, query_frames, keys: what q and k hold if not the whole axis, and fewer key heads; see `corrdit.ops`.
            q must hold the tokens; the softmax goes over the keys that k holds, others have weight 0.
        backend: "auto", "triton", "streaming" or "reference".
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        `AttentionMass`, float32 (float64 for float64 input); with heads="none" a head axis after the batch. Not
        differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    problem = checks.checked_problem(
        q, k, None, grid, heads=heads, head_weights=head_weights, scale=scale, key_mask=key_mask, queries=queries,
        query_frames=query_frames, keys=keys, memory_budget=memory_budget,
    )  # fmt: skip
    source = checks.check_frame("source", source, grid)
    chosen = checks.check_frame_tokens(tokens, problem, source, q.device)
    q, k, problem = problem.of_read_heads(q, k)
    with full_precision(q):
        implementation = select_backend(backend, q, problem)
        mass = AttentionMass(*implementation.attention_mass(q, k, problem, chosen, source=source))
    return mass if heads == "none" else AttentionMass(*(part.squeeze(1) for part in mass))
