"""The tracker "released", scaled as the published settings scale it, gives the tracks of DiffTrack's tracking code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import TokenGrid
from corrdit.evaluation import chosen_trackers
from corrdit.integrations.diffusers import Preset, ReadingPreset


class FixedBackbone:
    """Its only layer has the given queries and keys whatever the video."""

    layers = 1

    def __init__(self, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, stride: int) -> None:
        self.q, self.k, self.token_grid, self.heads = q, k, grid, q.shape[1]
        self.token_stride = (stride, stride)
        size = {"height": grid.height * stride, "width": grid.width * stride}
        self.preset = Preset(ReadingPreset(0, **size))

    def timestep(self, step, inference_steps):
        return 19.0

    def encode_frames(self, video, *, height, width, **resizing):
        return torch.zeros(len(video), 1, 2, 2)

    def forward(self, latents, timestep, operations):
        return {layer: operation(self.q, self.k, self.token_grid, None) for layer, operation in operations.items()}


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("scale", ["headdim", "numheads"])
def test_tracks_equal_the_released_ones(golden, case, scale):
    numbers = golden("difftrack_match")
    heads, dim, frames, height, width, seed, stride = (int(value) for value in numbers[f"{case}_meta"])

    def drawn(seed: int) -> torch.Tensor:
        shape = (1, heads, frames, height * width, dim)
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return 2 * torch.from_numpy(values).flatten(2, 3)

    backbone = FixedBackbone(drawn(seed), drawn(seed + 100), TokenGrid(frames, height, width), stride)
    temperature = 1.0 if scale == "headdim" else (dim / heads) ** 0.5
    (choice,) = chosen_trackers("released", {"temperature": temperature})
    points = numbers[f"{case}_points"][0]
    queries = np.concatenate([np.zeros((len(points), 1), np.float32), points], axis=1)
    tracks = choice.build(backbone)(np.zeros((frames, height * stride, width * stride, 3), np.uint8), queries)
    expected = numbers[f"{case}_{scale}_tracks"][0]
    np.testing.assert_allclose(tracks.xy.numpy()[1:], expected[1:], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_two_scales_differ(golden):
    numbers = golden("difftrack_match")
    assert not np.array_equal(numbers["0_headdim_tracks"], numbers["0_numheads_tracks"])
