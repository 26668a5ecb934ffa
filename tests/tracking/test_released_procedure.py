"""The published preset on fixed queries and keys gives the tracks of DiffTrack's released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import PointTracker, TokenGrid
from corrdit.integrations.diffusers import Preset, ReadingPreset


class FixedBackbone:
    """Its only layer has the given queries and keys whatever the video."""

    layers = heads = 1

    def __init__(self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, stride: int) -> None:
        self.q, self.k, self.token_grid = q, k, grid
        self.heads = q.shape[1]
        self.token_stride = (stride, stride)
        size = {"height": grid.height * stride, "width": grid.width * stride}
        self.preset = Preset(ReadingPreset(0, heads="logits", head=0, noise=True, frames_per_chunk=2, **size))

    def timestep(self, step, inference_steps):
        return 19.0

    def encode_frames(self, video, *, height, width, **resizing):
        assert (height, width) == (self.preset.reading.height, self.preset.reading.width)
        self.encoded, self.resizing = video, resizing
        return torch.zeros(len(video), 1, 2, 2)

    def forward(self, latents, timestep, operations):
        assert len(latents) == self.token_grid.frames
        return {layer: operation(self.q, self.k, self.token_grid, None) for layer, operation in operations.items()}


@pytest.mark.parametrize("case", [0, 1])
def test_tracks_equal_the_released_ones(golden, case):
    numbers = golden("difftrack_match")
    heads, dim, frames, height, width, seed, stride = (int(value) for value in numbers[f"{case}_meta"])

    def drawn(seed: int) -> torch.Tensor:
        shape = (1, heads, frames, height * width, dim)
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return 2 * torch.from_numpy(values).flatten(2, 3)

    backbone = FixedBackbone(drawn(seed), drawn(seed + 100), TokenGrid(frames, height, width), stride)
    video = np.zeros((frames, height * stride, width * stride, 3), np.uint8)
    points = numbers[f"{case}_points"][0]
    queries = np.concatenate([np.zeros((len(points), 1), np.float32), points], axis=1)
    tracks = PointTracker(backbone, preset="published").track(video, queries)
    expected = numbers[f"{case}_headdim_tracks"][0]
    np.testing.assert_allclose(tracks.xy.numpy()[1:], expected[1:], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert bool(tracks.visible.all())


def test_frames_are_resized_twice_without_antialiasing():
    grid = TokenGrid(3, 4, 6)
    q = torch.randn(1, 2, grid.video_tokens, 4, generator=torch.Generator().manual_seed(0))
    video = np.random.default_rng(1).integers(0, 256, (3, 300, 500, 3), dtype=np.uint8)
    for antialias, shape in ((False, (300, 500)), (True, (256, 256))):
        backbone = FixedBackbone(q, q, grid, 8)
        PointTracker(backbone, preset="published", antialias=antialias).track(video, [(0, 5.0, 5.0)])
        assert backbone.resizing == ({} if antialias else {"first": (256, 256), "antialias": False})
        assert tuple(backbone.encoded.shape[1:3]) == shape
