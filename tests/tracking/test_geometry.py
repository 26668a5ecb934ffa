"""Pixels and tokens, maps read between tokens, DiffTrack's released geometry, and stretching over time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit.geometry import (
    bilinear_tokens,
    nearest_tokens,
    pixels_to_tokens,
    sample_map,
    sample_matches,
    tokens_to_pixels,
)
from corrdit.tracking import interpolate_tracks


def own_positions(height: int, width: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((column, row), -1).float()


def test_token_centres():
    assert tokens_to_pixels(torch.tensor([2.0, 1.0]), (8, 16)).tolist() == [40.0, 12.0]
    assert pixels_to_tokens(torch.tensor([40.0, 12.0]), (8, 16)).tolist() == [2.0, 1.0]
    points = torch.rand(50, 2) * 100
    torch.testing.assert_close(tokens_to_pixels(pixels_to_tokens(points, 7), 7), points)


def test_a_still_video_leaves_every_point_where_it_is():
    height, width, stride = 5, 7, (4, 6)
    points = torch.rand(200, 2) * torch.tensor([width * 6.0, height * 4.0])
    points[:4] = torch.tensor([[0.0, 0.0], [42.0, 20.0], [0.0, 20.0], [42.0, 0.0]])
    moved = sample_matches(own_positions(height, width).expand(2, 3, -1, -1, -1), points, stride)
    assert moved.shape == (2, 3, 200, 2)
    torch.testing.assert_close(moved, points.expand(2, 3, -1, -1), atol=1e-4, rtol=0)


def test_a_translation_and_a_zoom_are_followed_exactly():
    height, width = 6, 8
    grid = own_positions(height, width)
    points = torch.rand(100, 2) * torch.tensor([width * 10.0, height * 10.0])
    shifted = sample_matches(grid + torch.tensor([1.5, -0.25]), points, 10)
    torch.testing.assert_close(shifted, points + torch.tensor([15.0, -2.5]), atol=1e-4, rtol=0)
    inner = points[((points > 5) & (points < torch.tensor([75.0, 55.0]))).all(-1)]
    zoomed = sample_matches(tokens_about_origin(grid, 1.25), inner, 10)
    torch.testing.assert_close(zoomed, inner * 1.25, atol=1e-4, rtol=0)


def tokens_about_origin(grid: torch.Tensor, factor: float) -> torch.Tensor:
    """Token positions after the frame was scaled about its top left corner."""
    return (grid + 0.5) * factor - 0.5


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("scale", ["headdim", "numheads"])
def test_released_geometry(golden, case, scale):
    reference = golden("difftrack_match")
    stride = int(reference[f"{case}_meta"][6])
    match = torch.from_numpy(reference[f"{case}_{scale}_match_xy"])[:, 0].permute(0, 2, 3, 1)
    points = torch.from_numpy(reference[f"{case}_points"][0])
    expected = reference[f"{case}_{scale}_tracks"][0]
    np.testing.assert_array_equal(expected[0], points.numpy())
    tracks = sample_matches(match, points, stride, geometry="released").numpy()
    assert np.abs(tracks - expected[1:]).max() / np.abs(expected).max() < 1e-5
    ours = sample_matches(match, points, stride).numpy()
    assert np.abs(ours - expected[1:]).max() > 1


def test_released_geometry_misplaces_a_still_point_by_up_to_half_a_token():
    height, width, stride = 30, 45, 16
    points = torch.rand(500, 2) * torch.tensor([700.0, 460.0]) + 5
    moved = sample_matches(own_positions(height, width), points, stride, geometry="released")
    error = (moved - points).abs().max()
    assert 4 < error < 12


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_sampling_agrees_with_grid_sample(padding):
    values = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    tokens = torch.rand(40, 2, dtype=torch.float64) * torch.tensor([7.0, 6.0]) - 1
    scaled = tokens / torch.tensor([5 - 1, 4 - 1]) * 2 - 1
    expected = torch.nn.functional.grid_sample(
        values.permute(0, 3, 1, 2), scaled[None, None].expand(3, 1, -1, -1), align_corners=True, padding_mode=padding
    )[:, :, 0].permute(0, 2, 1)
    torch.testing.assert_close(sample_map(values, tokens, padding=padding), expected)
    each = torch.rand(3, 40, 2, dtype=torch.float64) * 4
    alone = torch.stack([sample_map(value, position) for value, position in zip(values, each, strict=True)])
    torch.testing.assert_close(sample_map(values, each), alone)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 4)])
def test_weights_sum_to_one_and_indices_stay_inside(size):
    indices, weights = bilinear_tokens(torch.rand(100, 2) * 8 - 2, size)
    assert indices.min() >= 0
    assert indices.max() < size[0] * size[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(100))
    assert (weights >= 0).all()


def test_nearest_token_owns_the_pixels_it_spans():
    pixels = torch.tensor([[0.0, 0.0], [7.99, 0.0], [8.0, 7.99], [31.9, 23.9], [40.0, -3.0]])
    assert nearest_tokens(pixels_to_tokens(pixels, 8), (3, 4)).tolist() == [0, 0, 1, 11, 3]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tokens_to_pixels(torch.zeros(3), 4), r"\[\.\.\., 2\]"),
        (lambda: tokens_to_pixels(torch.zeros(2), 0), "stride must be"),
        (lambda: tokens_to_pixels(torch.zeros(2), (1, 2, 3)), "stride must be"),
        (lambda: pixels_to_tokens(torch.zeros(2), 4, geometry="centre"), "geometry must be one of"),
        (lambda: pixels_to_tokens(torch.zeros(2), 4, geometry="released"), "grid_size"),
        (lambda: sample_matches(torch.zeros(4, 5, 3), torch.zeros(1, 2), 4), "match_xy must have shape"),
        (lambda: sample_matches(torch.zeros(4, 5, 2), torch.zeros(2), 4), "points must have shape"),
        (lambda: sample_map(torch.zeros(4, 5, 2, dtype=torch.int64), torch.zeros(1, 2)), "floating-point"),
        (lambda: bilinear_tokens(torch.full((1, 2), torch.nan), (2, 2)), "NaN"),
        (lambda: bilinear_tokens(torch.zeros(1, 2), (2, 2), padding="reflect"), "padding must be one of"),
        (lambda: nearest_tokens(torch.zeros(1, 2), (0, 2)), "grid_size"),
    ],
)
def test_geometry_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_interpolation_matches_the_released_code(golden):
    reference = golden("interpolate")
    stretched = interpolate_tracks(reference["x"], 49)
    assert isinstance(stretched, np.ndarray)
    assert np.abs(stretched - reference["y"]).max() / np.abs(reference["y"]).max() < 1e-5
    tensor = interpolate_tracks(torch.from_numpy(reference["x"]).double(), 49)
    assert tensor.dtype == torch.float64


def test_interpolation_of_one_latent_frame_and_of_fewer_frames():
    one = torch.rand(2, 1, 3, 2)
    torch.testing.assert_close(interpolate_tracks(one, 4), one.expand(-1, 4, -1, -1))
    many = torch.rand(2, 9, 3, 2)
    expected = torch.nn.functional.interpolate(
        many.permute(0, 2, 3, 1).reshape(2, 6, 9), size=4, mode="linear", align_corners=False
    )
    torch.testing.assert_close(interpolate_tracks(many, 4), expected.reshape(2, 3, 2, 4).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    "tracks, frames, message",
    [
        (np.zeros((13, 5, 2), np.float32), 49, r"\[batch, latent frames, points, 2\]"),
        (np.zeros((1, 0, 5, 2), np.float32), 49, "at least one latent frame"),
        (np.zeros((1, 13, 5, 2), np.int64), 49, "floating-point"),
        (np.zeros((1, 13, 5, 2), np.float32), 0, "frames must be"),
    ],
)
def test_interpolation_refuses(tracks, frames, message):
    with pytest.raises(ValueError, match=message):
        interpolate_tracks(tracks, frames)
