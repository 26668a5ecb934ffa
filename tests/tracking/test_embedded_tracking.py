"""Tracking with the shipped model on generated clips whose truth is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import PointTracker, load_backbone
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.tracking.baselines import standing_still

SEEDS = range(2_100_000_000, 2_100_000_004)
MOVED_PIXELS = 8.0


@pytest.fixture(scope="module")
def clips():
    return generate(list(SEEDS), WorldConfig(frames=6, height=48, width=64, sprites=(1, 3)))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded")


def moving_errors(track, clips) -> torch.Tensor:
    """Errors in pixels at visible positions that lie more than 8 pixels from the query, all clips together."""
    x, y = np.meshgrid(np.arange(5, 64, 9) + 0.3, np.arange(4, 48, 8) + 0.7)
    queries = np.stack([np.zeros(x.size), x.ravel(), y.ravel()], axis=1).astype(np.float32)
    errors = []
    for clip in clips:
        truth, tracks = clip.tracks(queries), track(clip.video, queries)
        moved = np.linalg.norm(truth.xy - queries[None, :, 1:], axis=-1) > MOVED_PIXELS
        distance = np.linalg.norm(np.asarray(tracks.xy) - truth.xy, axis=-1)
        errors.append(torch.from_numpy(distance[moved & truth.visible]))
    return torch.cat(errors)


def test_refinement_lowers_the_error(backbone, clips):
    whole_tokens = moving_errors(PointTracker(backbone, refine=0, crops=()).track, clips)
    refined = moving_errors(PointTracker(backbone, crops=()).track, clips)
    assert refined.median() < 0.9 * whole_tokens.median()
    assert (refined <= 2).float().mean() > (whole_tokens <= 2).float().mean()


@pytest.mark.slow
def test_crops_lower_the_error_further_and_moving_points_are_followed(backbone, clips):
    whole_frames = moving_errors(PointTracker(backbone, crops=()).track, clips)
    looked_again = moving_errors(PointTracker(backbone).track, clips)
    still = moving_errors(lambda video, queries: standing_still(queries, len(video)), clips)
    assert looked_again.median() < whole_frames.median()
    assert (looked_again <= 1).float().mean() > (whole_frames <= 1).float().mean()
    assert looked_again.median() < 0.5 * still.median()
    assert (still <= MOVED_PIXELS).float().mean() == 0


def test_released_procedure_is_behind_the_default(backbone, clips):
    released = moving_errors(PointTracker(backbone, preset="published", resize_first=None).track, clips)
    default = moving_errors(PointTracker(backbone, crops=()).track, clips)
    assert default.median() < released.median()
