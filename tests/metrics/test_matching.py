"""Counting right matches."""

from __future__ import annotations

import math

import pytest
import torch

from corrdit.metrics.matching import MatchingHits, matching_hits


def shifted_matches(frames: int, height: int, width: int, shift: float) -> torch.Tensor:
    """Each token of frame 0 moves by `shift` columns a frame."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.stack((x + shift * frame, y + 0 * frame), -1).float() for frame in range(1, frames)])


def test_cases_are_visible_and_moving_and_hits_are_near():
    matches = shifted_matches(3, 4, 8, 1.0)
    start = torch.tensor([[10.0, 10.0], [30.0, 20.0], [50.0, 15.0], [12.0, 33.0]])
    moved = torch.tensor([[10.0, 0.0], [10.0, 0.0], [16.0, 0.0], [0.0, 0.0]])
    tracks = torch.stack([start, start + moved, start + 2 * moved])
    visible = torch.ones(3, 4, dtype=torch.bool)
    visible[2, 1] = False
    # A token is 10 pixels. Points 0 and 1 go with the matches, point 2 by 6 pixels more a frame, point 3 stands still.
    every = matching_hits(matches, tracks, visible, source=0, stride=10, thresholds=(0.5, 1.0, 1.5))
    assert (every.hits, every.cases) == ((3, 5, 6), 7)
    moving = matching_hits(matches, tracks, visible, source=0, stride=10, thresholds=(0.5,), least_motion=0.5)
    assert (moving.hits, moving.cases) == ((3,), 5)
    visible[0] = False
    none = matching_hits(matches, tracks, visible, source=0, stride=10)
    assert none.cases == 0
    assert math.isnan(none.accuracy[0])


def test_distances_are_in_tokens_of_either_side():
    matches = shifted_matches(2, 4, 4, 0.0)
    tracks = torch.tensor([[[10.0, 10.0]], [[10.0, 17.0]]])
    visible = torch.ones(2, 1, dtype=torch.bool)
    assert matching_hits(matches, tracks, visible, source=0, stride=(5, 10)).hits == (0,)
    assert matching_hits(matches, tracks, visible, source=0, stride=(10, 5)).hits == (1,)


def test_counts_add_up():
    total = MatchingHits((1, 2), 4) + MatchingHits((0, 1), 6)
    assert total == MatchingHits((1, 3), 10)
    assert total.accuracy == (0.1, 0.3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tracks": torch.zeros(3, 4)}, r"tracks must be \[frames, points, 2\]"),
        ({"visible": torch.ones(3, 4)}, "visible boolean"),
        ({"match_xy": torch.zeros(3, 4, 8, 2)}, r"must be \[2 target frames"),
        ({"source": 3}, "source frame 3 is outside"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "match_xy": shifted_matches(3, 4, 8, 1.0),
        "tracks": torch.zeros(3, 4, 2),
        "visible": torch.ones(3, 4, dtype=torch.bool),
        "source": 0,
        "stride": 10,
    }
    with pytest.raises(ValueError, match=message):
        matching_hits(**{**arguments, **change})
