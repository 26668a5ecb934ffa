"""Measuring a model in training on videos whose true motion is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.metrics.matching import MatchingHits, matching_hits

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
    def measure(self, backbone: Any, layers: Sequence[int]) -> dict[tuple[int, float], MatchingHits]:
        """Right matches among moving points by (layer, timestep).

        The model's mode (train or eval) and torch's random numbers are as before afterwards.

        Args:
            backbone: what `corrdit.load_backbone` gives.
            layers: non-negative indices.
        """
        clips, starts = self._videos()
        transformer = backbone.transformer
        training = transformer.training
        found: dict[tuple[int, float], MatchingHits] = {}
        with torch.random.fork_rng():
            transformer.eval()
            try:
                for index, clip in enumerate(clips):
                    latents = backbone.encode_frames(clip.video, height=self.height, width=self.width)
                    generator = torch.Generator().manual_seed(self.seed + index)
                    noise = torch.randn(latents.shape, generator=generator).to(latents)
                    truth = clip.tracks(starts)
                    for timestep in self.timesteps:
                        noisy = backbone.add_noise(latents, noise, timestep)
                        matches = backbone.forward(noisy, timestep, {layer: _matches for layer in layers})
                        for layer in layers:
                            hits = self._hits(matches[layer][0], truth)
                            key = (layer, float(timestep))
                            found[key] = found[key] + hits if key in found else hits
            finally:
                transformer.train(training)
        return found

    def _videos(self) -> tuple[list[Any], np.ndarray]:
        from corrdit.integrations.embedded.world import WorldConfig, generate

        config = WorldConfig(frames=self.frames, height=self.height, width=self.width)
        clips = generate([self.seed + index for index in range(self.clips)], config)
        share = (np.arange(self.points) + 0.5) / self.points
        y, x = np.meshgrid(share * self.height, share * self.width, indexing="ij")
        return clips, np.stack((np.zeros_like(x), x, y), -1).reshape(-1, 3)

    def _hits(self, match_xy: torch.Tensor, truth: Any) -> MatchingHits:
        rows, columns = match_xy.shape[1:3]
        return matching_hits(
            match_xy,
            torch.as_tensor(truth.xy),
            torch.as_tensor(truth.visible),
            source=0,
            stride=(self.height / rows, self.width / columns),
            thresholds=(self.threshold,),
            least_motion=self.least_motion,
        )


def _matches(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Match of every token of the first frame in every other frame, float32 `[B, F - 1, h, w, 2]`."""
    return ops.match(q, k, grid, source=0, key_mask=key_mask).xy.float().cpu()
