"""Matching of every token of a source frame with target frames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.arguments import entries, flag, whole_number
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import BackendInput, backend_input, full_precision, select_backend


class Match(NamedTuple):
    """Where each token of the source frame lies in each target frame.

    Attributes:
        xy: `[B, Ft, h, w, 2]` position (x, y) in tokens of the target frame.
        score: `[B, Ft, h, w]` cost value of the match, in 0 to 1.
    """

    xy: Tensor
    score: Tensor


@torch.no_grad()
def match(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    source: int = 0,
    targets: Iterable[int] | None = None,
    heads: str = "probabilities",
    head_weights: Tensor | Iterable[float] | None = None,
    bidirectional: bool = True,
    refine: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Match:
    """Best match of every token of the source frame in each target frame.

    `C[p, p'] = (P_forward[p, p'] + P_backward[p', p]) / 2`: the softmax over the target frame of
    `scale * q_source.k_target` and the softmax over the source frame of `scale * q_target.k_source`. The match is the
    argmax of C over p' (ties go to the lowest flat index), its score the maximum. Source: DiffTrack, "Emergent Temporal
    Correspondences from Video Diffusion Transformers" (arXiv 2506.17220), query-key matching.

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16, float32 or float64. Text tokens take no part.
        grid: how the N tokens are arranged.
        source: the frame whose tokens are matched.
        targets: the frames they are matched in; None for every frame but the source, in order.
        heads: what is averaged over heads: "probabilities", "logits", "features", or "none" to keep the heads apart.
        head_weights: `[H]` non-negative weights of the heads in that average, normalised to sum 1.
        bidirectional: whether the backward softmax takes part; without it C is P_forward.
        refine: radius in tokens round the argmax within which the C-weighted mean of positions is taken; 0 for none.
        scale: factor of q.k, `D ** -0.5` by default.
        key_mask: bool `[B, N]`, True = may be attended; each softmax leaves out its removed keys.
        backend: "auto", "triton", "streaming" or "reference".
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        `Match(xy [B, Ft, h, w, 2], score [B, Ft, h, w])`, float32 (float64 for float64 input); with heads="none" a head
        axis after the batch. Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.check_tokens(grid, q=q, k=k)
    weights = checks.check_heads(heads, head_weights, q)
    source = checks.check_frame("source", source, grid)
    wanted = _target_frames(targets, source, grid)
    key_mask = checks.check_key_mask(key_mask, q)
    module = select_backend(backend, q)
    given = backend_input(module, BackendInput(q, k, grid, key_mask, heads, weights))
    with full_precision(q):
        xy, score = module.match(
            given.q,
            given.k,
            given.grid,
            source,
            wanted,
            heads=given.heads,
            weights=given.weights,
            scale=checks.check_scale(scale, q.shape[-1]),
            key_mask=given.key_mask,
            bidirectional=flag("bidirectional", bidirectional),
            refine=min(whole_number("refine", refine, 0), max(grid.height, grid.width)),
            memory_budget=checks.check_budget(memory_budget),
        )
    return Match(xy, score)


def _target_frames(targets: Iterable[int] | None, source: int, grid: TokenGrid) -> list[int]:
    """The frames asked for; every frame but the source for None."""
    if targets is None:
        wanted = [frame for frame in range(grid.frames) if frame != source]
        if not wanted:
            raise ValueError("the grid has one frame, so no frame but the source is left; give targets or more frames")
        return wanted
    wanted = [checks.check_frame("targets", frame, grid) for frame in entries("targets", targets)]
    if not wanted:
        raise ValueError("targets is empty; give at least one frame, or None for every frame but the source")
    return wanted
