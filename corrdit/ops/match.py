"""Matching of every token of a source frame with target frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.arguments import entries, flag, whole_number
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend


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
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
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
        queries, query_frames, keys: what q and k hold if not the whole axis, and fewer key heads; see `corrdit.ops`.
            Tokens of the source frame that q holds are matched; with `bidirectional` it must hold all of the targets.
        backend: "auto", "triton", "streaming" or "reference".
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        `Match(xy [B, Ft, h, w, 2], score [B, Ft, h, w])`, float32 (float64 for float64 input); with heads="none" a head
        axis after the batch. A range of `queries` has one axis `[n]` of those in the source frame in place of (row,
        column). Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    problem = checks.checked_problem(
        q, k, None, grid, heads=heads, head_weights=head_weights, scale=scale, key_mask=key_mask, queries=queries,
        query_frames=query_frames, keys=keys, memory_budget=memory_budget,
    )  # fmt: skip
    source = checks.check_frame("source", source, grid)
    problem = replace(problem, pairs=[(source, target) for target in _target_frames(targets, source, grid)])
    held = checks.held_source(problem, source)
    if flag("bidirectional", bidirectional):
        checks.check_both_directions(problem)
    q, k, problem = problem.of_read_heads(q, k)
    with full_precision(q):
        xy, score = select_backend(backend, q, problem).match(
            q,
            k,
            problem,
            bidirectional=bool(bidirectional),
            refine=min(whole_number("refine", refine, 0), max(grid.height, grid.width)),
        )
    places = (held.tokens,) if problem.queries.selection == "range" else (grid.height, grid.width)
    if heads != "none":
        xy, score = xy.squeeze(1), score.squeeze(1)
    return Match(xy.unflatten(-2, (-1, *places)), score.unflatten(-1, (-1, *places)))


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
