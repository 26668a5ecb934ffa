"""Baselines of the tracker, on videos whose motion is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit.tracking.baselines import nearest_patches, standing_still

FRAMES, HEIGHT, WIDTH = 5, 24, 32


def drifting_video(dx: int, dy: int) -> np.ndarray:
    """Noise of a large canvas seen through a window that moves, so that everything shifts by (dx, dy) a frame."""
    canvas = np.random.default_rng(0).integers(0, 255, (HEIGHT + 80, WIDTH + 80, 3), dtype=np.uint8)
    corners = [(40 - dy * frame, 40 - dx * frame) for frame in range(FRAMES)]
    return np.stack([canvas[top : top + HEIGHT, left : left + WIDTH] for top, left in corners])


def test_standing_still() -> None:
    tracks = standing_still([[0, 3.25, 4.5], [4, 31, 2]], FRAMES)
    assert tracks.xy.shape == (FRAMES, 2, 2)
    np.testing.assert_array_equal(tracks.xy[:, 0], np.tile((3.25, 4.5), (FRAMES, 1)))
    assert bool(tracks.visible.all())
    with pytest.raises(ValueError, match="frame must be a whole number from 0 to 4"):
        standing_still([[5, 0, 0]], FRAMES)


@pytest.mark.parametrize("dx, dy", [(1, 0), (-2, 1), (0, 0)])
def test_nearest_patches_follow_a_shift_exactly(dx: int, dy: int) -> None:
    queries = torch.tensor([[0, 14.25, 12.75], [2, 16.0, 11.5], [4, 15.9, 12.1]])
    tracks = nearest_patches(drifting_video(dx, dy), queries)
    steps = torch.arange(FRAMES)[:, None] - queries[None, :, 0]
    wanted = queries[None, :, 1:] + steps[..., None] * torch.tensor([dx, dy])
    torch.testing.assert_close(tracks.xy, wanted)
    assert tracks.score.min() > 0.99
    assert bool(tracks.visible.all())


def test_nearest_patches_at_the_border_and_without_contrast() -> None:
    corners = [[0, 0, 0], [0, WIDTH, HEIGHT], [1, WIDTH, 0]]
    tracks = nearest_patches(drifting_video(0, 0), corners)
    torch.testing.assert_close(tracks.xy, torch.tensor(corners, dtype=torch.float32)[None, :, 1:].repeat(FRAMES, 1, 1))
    plain = nearest_patches(np.full((2, 8, 8, 3), 200, np.uint8), [[0, 4, 4]])
    assert bool(torch.isfinite(plain.score).all())


def test_scores_tell_a_changed_patch() -> None:
    video = drifting_video(0, 0)
    video[3] = 255 - video[3]
    score = nearest_patches(video, [[0, 16, 12]]).score[:, 0]
    assert score[3] < 0.6 < score[4]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="radius=-1"):
        nearest_patches(drifting_video(0, 0), [[0, 1, 1]], radius=-1)
    with pytest.raises(ValueError, match="x must be from 0 to 32"):
        nearest_patches(drifting_video(0, 0), [[0, 33, 1]])
