"""What the callbacks measure in one attention layer: matches, and how far they can be trusted without truth."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.metrics.matching import MatchingHits, matching_hits

Key = TypeVar("Key", bound=Hashable)

ATTENTION_ROWS = 64
"""Query tokens, evenly spread over the source frame, whose attention is summed."""


@dataclass(frozen=True)
class MatchMeasurement:
    """Matches from one frame to all others, and figures of them that need no truth.

    An operation for `corrdit.capture`. Its result is a dict of float32 CPU tensors:

    - `match_xy [B, F - 1, h, w, 2]`: match of each source token in every other frame, in tokens (DiffTrack's mean of
      the two directions' softmax, averaged over heads);
    - `score [B]`: mean of the match's value;
    - `consistency [B]`: share of matches whose own match in the source frame is within one token of the start;
    - `motion [B]`: mean length of the displacement, in tokens;
    - `text [B]`, `own_frame [B]`, `other_frames [B]`: attention of the source frame's tokens to each.

    Args:
        source: source frame.
        heads: how heads are combined, as in `corrdit.ops.match`.
        backend: of the operations.
        memory_budget: bytes beyond inputs and outputs.

    Raises:
        ValueError: at the call: a video of one latent frame, or a source frame outside it.
    """

    source: int = 0
    heads: str = "probabilities"
    backend: str = "auto"
    memory_budget: int | None = None

    @torch.no_grad()
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if grid.frames < 2:
            raise ValueError("correspondence needs at least two latent frames, this forward has one")
        common: dict[str, Any] = {"key_mask": key_mask, "backend": self.backend, "memory_budget": self.memory_budget}
        match = ops.match(q, k, grid, source=self.source, heads=self.heads, **common)
        returning = [(frame, self.source) for frame in range(grid.frames) if frame != self.source]
        back = ops.hard_displacement(q, k, grid, frames=returning, heads=self.heads, **common)
        xy = match.xy.float()
        own = grid.coordinates(device=xy.device).unflatten(0, (grid.height, grid.width))
        landed = xy.round().long()
        flat = (landed[..., 1] * grid.width + landed[..., 0]).flatten(2)
        returned = back.flatten(2, 3).gather(2, flat[..., None].expand(*flat.shape, 2)).unflatten(2, own.shape[:2])
        missed = (landed + returned - own).norm(dim=-1)
        rows = torch.linspace(0, grid.tokens_per_frame - 1, min(ATTENTION_ROWS, grid.tokens_per_frame)).round().long()
        mass = ops.attention_mass(q, k, grid, rows.to(q.device), source=self.source, **common)
        own_frame = mass.frames[..., self.source].float()
        figures = {
            "match_xy": xy,
            "score": match.score.float().mean((1, 2, 3)),
            "consistency": (missed <= 1).float().mean((1, 2, 3)),
            "motion": (xy - own).norm(dim=-1).mean((1, 2, 3)),
            "text": mass.text.float().mean(1),
            "own_frame": own_frame.mean(1),
            "other_frames": (mass.frames.float().sum(-1) - own_frame).mean(1),
        }
        return {name: value.cpu() for name, value in figures.items()}


def first_frame_hits(
    match_xy: torch.Tensor,
    tracks: torch.Tensor,
    visible: torch.Tensor,
    *,
    size: tuple[int, int],
    threshold: float,
    least_motion: float,
) -> MatchingHits:
    """Right matches from the first frame, by `matching_hits`; size is (height, width) of the video in pixels."""
    stride = (size[0] / match_xy.shape[1], size[1] / match_xy.shape[2])
    return matching_hits(
        match_xy, tracks, visible, source=0, stride=stride, thresholds=(threshold,), least_motion=least_motion
    )


def summed_hits(found: Iterable[tuple[Key, MatchingHits]]) -> dict[Key, MatchingHits]:
    """Sums of the counts of each key."""
    sums: dict[Key, MatchingHits] = {}
    for key, hits in found:
        sums[key] = sums[key] + hits if key in sums else hits
    return sums
