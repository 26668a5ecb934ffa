"""Measuring a model in training on videos whose true motion is known exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.embedded.world import Clip, WorldConfig, generate
from corrdit.integrations.lightning.measurement import first_frame_hits, summed_hits
from corrdit.metrics.matching import MatchingHits
from corrdit.tracking.queries import grid_points

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
            truth = clip.tracks(starts)
            for timestep in self.timesteps:
                noisy = backbone.add_noise(latents, noise, timestep)
                matches = backbone.forward(noisy, timestep, {layer: _matches for layer in layers})
                for layer in layers:
                    hits = first_frame_hits(
                        matches[layer][0],
                        torch.as_tensor(truth.xy),
                        torch.as_tensor(truth.visible),
                        size=(self.height, self.width),
                        threshold=self.threshold,
                        least_motion=self.least_motion,
                    )
                    yield (layer, float(timestep)), hits


def _matches(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Match of every token of the first frame in every other frame, float32 `[B, F - 1, h, w, 2]`."""
    return ops.match(q, k, grid, source=0, key_mask=key_mask).xy.float().cpu()
