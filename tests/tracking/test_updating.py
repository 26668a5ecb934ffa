"""Features of a point that follow its looks: the plain costs where nothing is updated, and what an update does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pixel_backbone import PixelBackbone, moving_texture

from corrdit import PointTracker, TokenGrid, ops
from corrdit.tracking.readings import Reading, TokenPair
from corrdit.tracking.updating import FeatureAverage, feature_costs, features_at

GRID = TokenGrid(3, 4, 5)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_costs_of_the_own_features_are_cost_rows(bidirectional):
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(1, 3, GRID.tokens, 8, generator=generator) for _ in range(2))
    weights = [1.0, 0.5, 2.0]
    pair, reading = TokenPair(q, k, GRID, None, weights, 0.3), Reading((0,), (0.0,), bidirectional=bidirectional)
    tokens = torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    got = feature_costs(pair, reading, features_at(pair, tokens, 1), source=1, target=2)
    wanted = ops.cost_rows(
        q, k, GRID, torch.tensor([7, 19]), source=1, heads="probabilities", head_weights=weights, scale=0.3,
        bidirectional=bidirectional,
    )[0, :, 2]  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_an_average_moves_only_where_it_is_trusted():
    average, own = FeatureAverage(0.25), (torch.ones(1, 2, 1), torch.zeros(1, 2, 1))
    assert average.of(own) is own
    average.see((torch.full((1, 2, 1), 5.0), torch.full((1, 2, 1), 4.0)), torch.tensor([True, False]))
    average.see((torch.full((1, 2, 1), 9.0), torch.full((1, 2, 1), 8.0)), torch.tensor([True, False]))
    q, k = average.of(own)
    torch.testing.assert_close(q[0, :, 0], torch.tensor([0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9, 1.0]))
    torch.testing.assert_close(k[0, :, 0], torch.tensor([0.75 * 0.25 * 4 + 0.25 * 8, 0.0]))
    other = (own[0] + 1, own[1])  # the same points as another chunk sees them
    torch.testing.assert_close(average.of(other)[0] - q, torch.tensor([[[0.75**2], [1.0]]]))


@pytest.mark.parametrize(
    "options", [{}, {"frames_per_block": 3}, {"path_spread": 0.0}, {"crops": (0.5,), "crop_tokens": 4}], ids=str
)
def test_a_vanishing_update_changes_nothing(options):
    video, points = moving_texture(9, (2, 1)), [[0, 40.0, 30.0], [5, 21.3, 12.7]]
    plain = PointTracker(PixelBackbone(), **options).track(video, points)
    updated = PointTracker(PixelBackbone(), update=1e-9, **options).track(video, points)
    torch.testing.assert_close(updated.xy, plain.xy, rtol=0, atol=0.02)  # kept maps are in half precision
    assert torch.equal(updated.visible, plain.visible)


def test_a_point_that_changes_slowly_is_kept():
    """A patch that turns into another one over nine frames, while its first looks stand elsewhere in the last ones."""
    rng = np.random.default_rng(3)
    background = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    first, last = rng.integers(0, 256, (2, 8, 8, 3)).astype(float)
    video = np.stack([background] * 9)
    for frame in range(9):
        share = frame / 8
        video[frame, 24:32, 40:48] = (1 - share) * first + share * last
        if frame >= 6:
            video[frame, 24:32, 56:64] = first
    point = [[0, 42.0, 26.0]]  # the centre of a token of the patch
    given = {"path_spread": 0.0, "visibility": "consistency", "tolerance": 1.5, "frames_per_chunk": 9}
    plain = PointTracker(PixelBackbone(20.0), **given).track(video, point)
    updated = PointTracker(PixelBackbone(20.0), update=0.8, **given).track(video, point)
    assert (plain.xy[8, 0] - torch.tensor([58.0, 26.0])).norm() < 4
    assert (updated.xy[8, 0] - torch.tensor([42.0, 26.0])).norm() < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": 1.5}, "update must be finite"),
        ({"update": 0.1, "schedule": "chained"}, "chained"),
        ({"update": 0.1, "heads": "logits"}, "heads='logits'"),
        ({"update": 0.1, "visibility": "all"}, "visibility"),
    ],
)
def test_what_an_update_does_not_go_with_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(PixelBackbone(), **options)
