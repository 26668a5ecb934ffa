"""Heatmaps, curves, maps over frames and principal components, looked at by their pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit.analysis.token_maps import principal_components
from corrdit.visualization import charts
from corrdit.visualization.attention_maps import draw_attention_maps, draw_components
from corrdit.visualization.charts import draw_curves, draw_heatmaps


def share_of(picture: np.ndarray, colour: tuple[int, int, int], tolerance: int = 12) -> float:
    return float((np.abs(picture.astype(int) - colour) <= tolerance).all(-1).mean())


@pytest.mark.parametrize(
    ("limits", "decimals"),
    [((0.0, 0.942), 3), ((-2.5, 1.0), 2), ((0.0, 23.4), 1), ((0.0, 5e3), 0), ((0.0, 1e-9), 3)],
)
def test_numbers_of_a_table_have_equally_many_decimals(limits, decimals):
    assert charts._decimals(limits) == decimals


def test_heatmap_shows_values_frames_the_largest_and_greys_what_is_missing():
    labels = {"rows": [0, 1], "columns": [10, 20, 30], "row_title": "layer", "column_title": "timestep"}
    values = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, np.nan]])
    picture = draw_heatmaps({"one": values}, **labels)
    assert picture.dtype == np.uint8
    assert share_of(picture, (0xE3, 0xE6, 0xEA), 2) > 0.02
    assert share_of(picture, (0xE4, 0x57, 0x2E), 40) > 0.001
    assert share_of(picture, (68, 1, 84)) > 0.02  # the smallest in viridis
    whole = draw_heatmaps({"one": np.nan_to_num(values)}, **labels)
    assert share_of(whole, (0xE3, 0xE6, 0xEA), 2) < 0.01
    four = draw_heatmaps(dict.fromkeys("abcd", values), **labels)
    assert four.shape[0] > 1.8 * picture.shape[0]
    draw_heatmaps({"none": values * np.nan}, **labels)
    with pytest.raises(ValueError, match="does not fit 2 rows and 3 columns"):
        draw_heatmaps({"one": values.T}, **labels)
    with pytest.raises(ValueError, match="panels is empty"):
        draw_heatmaps({}, **labels)


def test_compared_maps_have_one_scale():
    labels = {"rows": [0, 1], "columns": [10, 20], "row_title": "layer", "column_title": "timestep"}
    dark = (68, 1, 84)  # the smallest in viridis
    low, high = np.array([[0.0, 0.1], [0.1, 0.1]]), np.array([[0.8, 0.9], [0.9, 1.0]])
    apart = share_of(draw_heatmaps({"high": high}, **labels), dark)
    together = draw_heatmaps({"low": low, "high": high}, **labels)
    assert apart > 0.02
    assert share_of(together[:, : together.shape[1] // 2], dark) > 0.02
    assert share_of(together[:, together.shape[1] // 2 : -120], dark, 20) == 0


def test_curves_begin_with_the_first_x():
    rising = draw_curves([999, 500, 19], {"a": np.array([0.0, 0.5, 1.0])}, title="t", x_title="x", y_title="y")
    blue = np.argwhere((np.abs(rising.astype(int) - (0x2A, 0x6F, 0xBB)) < 12).all(-1))
    left, right = blue[blue[:, 1].argmin()], blue[blue[:, 1] > blue[:, 1].min() + 100]
    assert right[:, 0].min() < left[0] - 50  # it rises to the right, from noise to the clean video
    with pytest.raises(ValueError, match="3 values are needed"):
        draw_curves([1, 2, 3], {"a": np.zeros(2)}, title="t", x_title="x", y_title="y")
    with pytest.raises(ValueError, match="cannot be told apart"):
        draw_curves([1], dict.fromkeys(range(9), np.zeros(1)), title="t", x_title="x", y_title="y")


def test_attention_is_brightest_where_it_is_largest_and_marks_are_drawn():
    frames = np.full((2, 40, 60, 3), 128, np.uint8)
    maps = np.zeros((2, 4, 6))
    maps[:, 1, 4] = 1
    plain = draw_attention_maps(frames, maps, size=(160, 240))
    place = np.unravel_index(plain[1].astype(int).sum(-1).argmax(), (160, 240))
    assert abs(place[0] - 60) < 22
    assert abs(place[1] - 180) < 22
    truth = np.array([[np.nan, np.nan], [15.0, 10.0]])
    marked = draw_attention_maps(frames, maps, size=(160, 240), query=np.array([45.0, 30.0]), truth=truth)
    ring = np.argwhere((marked[0] != plain[0]).any(-1)).mean(0)
    cross = np.argwhere((marked[1] != plain[1]).any(-1)).mean(0)
    assert np.abs(ring - (120, 180)).max() < 2
    assert np.abs(cross - (40, 60)).max() < 2
    with pytest.raises(ValueError, match="2 frames need maps"):
        draw_attention_maps(frames, maps[:1], size=(160, 240))


def test_components_are_those_of_the_singular_value_decomposition_and_are_drawn_as_blocks():
    vectors = torch.randn(200, 5) @ torch.diag(torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1])) + 7
    found = principal_components(vectors)
    assert found.shape == (200, 3)
    assert found.min() == 0
    assert found.max() == 1
    exact = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    for component in range(3):
        inner = (found[:, component] > 0) & (found[:, component] < 1)
        pair = torch.stack((found[inner, component], exact.U[inner, component]))
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.999
    assert torch.equal(principal_components(torch.randn(20, 2))[:, 2], torch.full((20,), 0.5))
    blocks = draw_components(found.reshape(2, 10, 10, 3).numpy(), (40, 60))
    assert blocks[0].shape == (40, 60, 3)
    assert len(np.unique(blocks[0][:4, :6].reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="components must be"):
        draw_components(np.zeros((2, 3, 4)), (8, 8))
