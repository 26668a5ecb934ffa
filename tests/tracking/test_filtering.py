"""The low-pass filter over the tokens of each frame."""

from __future__ import annotations

import math

import pytest
import torch

from corrdit import TokenGrid
from corrdit.tracking.filtering import low_pass

GRID = TokenGrid(frames=2, height=9, width=24)


def wave(cycles: float) -> torch.Tensor:
    """`[1, 1, N, 1]`: a cosine of so many cycles a token along the columns."""
    return torch.cos(2 * math.pi * cycles * GRID.coordinates(dtype=torch.float64)[:, 0]).repeat(2)[None, None, :, None]


@pytest.mark.parametrize("cycles", [0.0, 1 / 12, 1 / 6, 1 / 4])
def test_a_wave_is_damped_by_the_gaussian_of_its_frequency(cycles):
    spread = 1.1
    smoothed, before = (
        values.reshape(2, 9, 24)[:, :, 8:16] for values in (low_pass(wave(cycles), GRID, spread), wave(cycles))
    )
    expected = math.exp(-2 * (math.pi * cycles * spread) ** 2)
    torch.testing.assert_close(smoothed, expected * before, atol=3e-3, rtol=0)


def test_frames_channels_and_heads_do_not_mix_and_a_constant_stays():
    tokens = torch.zeros(1, 2, GRID.video_tokens, 3)
    tokens[0, 1, GRID.frame_slice(1), 2] = 5.0
    torch.testing.assert_close(low_pass(tokens, GRID, 0.9), tokens)


def test_no_spread_leaves_everything_and_the_precision_is_kept():
    tokens = torch.randn(1, 1, GRID.video_tokens, 2, dtype=torch.bfloat16)
    assert low_pass(tokens, GRID, 0.0) is tokens
    assert low_pass(tokens, GRID, 0.5).dtype == torch.bfloat16


def test_bad_filters_are_named():
    with pytest.raises(ValueError, match="spread must be"):
        low_pass(torch.zeros(1, 1, GRID.video_tokens, 2), GRID, -1.0)
    with pytest.raises(ValueError, match="tokens must be"):
        low_pass(torch.zeros(1, 1, 5, 2), GRID, 1.0)
