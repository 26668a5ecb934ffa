"""What the callbacks measure in one attention layer: matches, how far they can be trusted without truth, and, on videos
whose true motion is known exactly, how many are right."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.embedded.world import Clip, WorldConfig, generate
from corrdit.metrics.matching import MatchingHits, matching_hits
from corrdit.tracking.queries import grid_points

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


PROBE_SEEDS = 1_900_000_000
"""First seed of the probe's videos, beyond those of any training."""


@dataclass(frozen=True)
class WorldProbe:
    """Generated videos, noised to fixed levels, through a model.

    Args:
        clips: number of videos.
        frames: of each, every one a latent of its own.
        height: in pixels.
        width: in pixels.
        timesteps: noise levels, as the model's scheduler counts them.
        points: points a side of the grid of start positions.
        threshold: largest distance of a right match, in tokens.
        least_motion: points that moved by more than this many tokens count.
        seed: of the videos and the noise.

    Raises:
        ValueError: a number out of range.
    """

    clips: int = 4
    frames: int = 8
    height: int = 32
    width: int = 32
    timesteps: Sequence[float] = (50, 300, 600)
    points: int = 16
    threshold: float = 1.0
    least_motion: float = 1.5
    seed: int = PROBE_SEEDS

    def __post_init__(self) -> None:
        for name in ("clips", "frames", "height", "width", "points"):
            least = 2 if name == "frames" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if len(self.timesteps) == 0:
            raise ValueError("timesteps is empty; give at least one noise level")

    @torch.no_grad()
    def measure(self, backbone: Backbone, layers: Sequence[int]) -> dict[tuple[int, float], MatchingHits]:
        """Right matches among moving points by (layer, timestep).

        The model's mode (train or eval) and torch's random numbers are as before afterwards.

        Args:
            backbone: what `corrdit.load_backbone` gives.
            layers: non-negative indices.
        """
        transformer = backbone.transformer
        training = transformer.training
        with torch.random.fork_rng():
            transformer.eval()
            try:
                return summed_hits(self._hits(backbone, layers))
            finally:
                transformer.train(training)

    def _videos(self) -> tuple[list[Clip], np.ndarray]:
        config = WorldConfig(frames=self.frames, height=self.height, width=self.width)
        clips = generate([self.seed + index for index in range(self.clips)], config)
        return clips, grid_points(self.points, self.height, self.width, np.float64)

    def _hits(self, backbone: Backbone, layers: Sequence[int]) -> Iterator[tuple[tuple[int, float], MatchingHits]]:
        clips, starts = self._videos()
        for index, clip in enumerate(clips):
            latents = backbone.encode_frames(clip.video, height=self.height, width=self.width)
            generator = torch.Generator().manual_seed(self.seed + index)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            truth, size = clip.tracks(starts), (self.height, self.width)
            true = (torch.as_tensor(truth.xy), torch.as_tensor(truth.visible))
            for timestep in self.timesteps:
                noisy = backbone.add_noise(latents, noise, timestep)
                matches = backbone.forward(noisy, timestep, {layer: _matches for layer in layers})
                for layer in layers:
                    hits = first_frame_hits(matches[layer][0], *true, size, self.threshold, self.least_motion)
                    yield (layer, float(timestep)), hits


def _matches(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Match of every token of the first frame in every other frame, float32 `[B, F - 1, h, w, 2]`."""
    return ops.match(q, k, grid, source=0, key_mask=key_mask).xy.float().cpu()
