"""The tracker "released", scaled as the published settings scale it, gives the tracks of DiffTrack's tracking code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import PointTracker, TokenGrid
from corrdit.evaluation import chosen_trackers
from corrdit.geometry import sample_matches
from corrdit.integrations.diffusers import Preset, ReadingPreset
from corrdit.tracking.released_costs import bfloat16_matches


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


def test_with_rounding_they_are_those_of_the_released_runs():
    """One chunk; near candidates tie in bfloat16, so that tracks are others than without rounding."""
    grid = TokenGrid(4, 6, 9)
    q, k = (
        0.6 * torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 3, 216, 16), dtype=np.float32))
        for seed in (3, 4)
    )
    backbone = FixedBackbone(q, k, grid, 16)
    video = np.zeros((4, 96, 144, 3), np.uint8)
    queries = np.array([[0, 40.0, 50.0], [0, 100.0, 12.0], [0, 7.0, 88.0]], np.float32)
    tracks = {
        rounding: chosen_trackers("released", {"rounding": rounding})[0].build(backbone)(video, queries).xy
        for rounding in ("none", "bfloat16")
    }
    matches = bfloat16_matches(q, k, grid)
    expected = sample_matches(matches, torch.from_numpy(queries[:, 1:]), stride=(16, 16), geometry="released")[0]
    assert torch.allclose(tracks["bfloat16"][1:], expected, atol=1e-4)
    assert not torch.allclose(tracks["bfloat16"], tracks["none"], atol=1.0)


def test_rounding_takes_no_weighted_heads():
    backbone = FixedBackbone(*(torch.zeros(1, 3, 24, 4),) * 2, TokenGrid(2, 3, 4), 16)
    with pytest.raises(ValueError, match="plain mean of all heads"):
        PointTracker(backbone, preset="published", rounding="bfloat16", heads="features")
