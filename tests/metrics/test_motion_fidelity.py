"""Motion fidelity against the released scores, on tracks with a known answer, and on tracks that stand still."""

from __future__ import annotations

import math

import numpy as np
import pytest

from corrdit.metrics import motion_fidelity


def moving(*velocities: tuple[float, float], frames: int = 6) -> np.ndarray:
    """Straight tracks `[points, frames, 2]`."""
    return np.stack([np.arange(frames)[:, None] * np.array(velocity) for velocity in velocities])


def test_equals_the_released_scores(golden):
    reference = golden("motion_fidelity")
    tracks = reference["tracks_generated"], reference["tracks_reference"]
    released = motion_fidelity(*tracks, variant="released")
    two_sided = motion_fidelity(*tracks)
    assert math.isclose(released, float(reference["released_score"]), rel_tol=1e-5)
    assert math.isclose(two_sided, float(reference["mf_both"]), rel_tol=1e-5)


def test_known_directions():
    right, up, diagonal = (1.0, 0.0), (0.0, -2.0), (1.0, 1.0)
    assert math.isclose(motion_fidelity(moving(right, up), moving(up, right)), 1)
    assert math.isclose(motion_fidelity(moving(right), moving(diagonal)), math.sqrt(0.5))
    assert math.isclose(motion_fidelity(moving(right), moving((-3.0, 0.0))), -1)
    # Both references are found exactly; of the two generated tracks one is, the other is at 45 degrees of the nearest.
    assert math.isclose(motion_fidelity(moving(right, diagonal), moving(right)), (1 + math.sqrt(0.5)) / 2 / 2 + 0.5)
    assert math.isclose(motion_fidelity(moving(right, up), moving(right, up), variant="released"), 0)


@pytest.mark.parametrize(
    "stationary, both_still, one_still",
    [("match", 1.0, 0.0), ("zero", 0.0, 0.0), ("exclude", 0.0, 0.0)],
)
def test_tracks_that_stand_still(stationary, both_still, one_still):
    still, right = moving((0.0, 0.0)), moving((1.0, 0.0))
    assert motion_fidelity(still, still, stationary=stationary) == both_still
    assert motion_fidelity(still, right, stationary=stationary) == one_still
    with pytest.raises(ValueError, match="1 generated and 0 reference tracks stand still"):
        motion_fidelity(still, right, stationary="error")


def test_a_pause_counts_as_the_option_says():
    walk, pause = moving((1.0, 0.0), frames=5), moving((1.0, 0.0), frames=5)
    pause[:, 2:4] = pause[:, 1:2]
    pause[:, 4:] = pause[:, 3:4] + 1.0
    # Steps: moving along x, still, still, moving along the diagonal.
    assert math.isclose(motion_fidelity(pause, walk, stationary="match"), (1 + math.sqrt(0.5)) / 4)
    assert math.isclose(motion_fidelity(pause, walk, stationary="exclude"), (1 + math.sqrt(0.5)) / 2)
    assert math.isclose(motion_fidelity(pause, pause, stationary="match"), 1)
    assert math.isclose(motion_fidelity(pause, pause, stationary="zero"), 0.5)


def test_still_below_takes_jitter_for_no_motion():
    jitter = np.random.default_rng(0).normal(0, 1e-4, (3, 6, 2))
    assert motion_fidelity(jitter, np.zeros((2, 6, 2)), rest_radius=0) < 1e-9
    assert motion_fidelity(jitter, np.zeros((2, 6, 2)), still_below=0.01, rest_radius=0) == 1


@pytest.mark.parametrize("noise", [1e-3, 1e-2, 0.04])
def test_a_resting_background_is_not_decided_by_the_noise_of_the_tracker(noise):
    """81 frames: one point in four moves, the others rest."""
    velocities = [(1.0, 0.5), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]
    clean = moving(*velocities, frames=81) + np.array([40.0, 30.0])
    one, other = (clean + np.random.default_rng(seed).normal(0, noise, clean.shape) for seed in (1, 2))
    assert motion_fidelity(one, other) > 0.99
    # Rest is like rest and unlike motion.
    assert motion_fidelity(one[1:], other[1:]) == 1
    assert motion_fidelity(one[1:], other[:1]) == 0
    # Slow motion that leaves its place is motion: half a pixel in all.
    slow = moving((0.01, 0.0), frames=81)
    assert motion_fidelity(slow, moving((0.0, 1.0), frames=81)) < 1e-9
    assert math.isclose(motion_fidelity(slow, moving((1.0, 0.0), frames=81)), 1)


@pytest.mark.parametrize(
    "generated, reference, options, message",
    [
        (moving((1, 0)), moving((1, 0)), {"variant": "paper"}, "variant must be one of"),
        (moving((1, 0)), moving((1, 0)), {"stationary": "nan"}, "stationary must be one of"),
        (moving((1, 0)), moving((1, 0)), {"still_below": -1}, "still_below"),
        (moving((1, 0)), moving((1, 0)), {"rest_radius": -1}, "rest_radius"),
        (moving((1, 0), frames=5), moving((1, 0), frames=6), {}, "generated has 5 frames and reference 6"),
        (moving((1, 0), (0, 1)), moving((1, 0)), {"variant": "released"}, "2 generated and 1 reference"),
        (moving((1, 0), frames=1), moving((1, 0), frames=1), {}, "two frames"),
        (moving((1, 0))[0], moving((1, 0)), {}, r"\[points, frames, 2\]"),
        (moving((1, 0)) * np.nan, moving((1, 0)), {}, "generated holds 12 numbers"),
    ],
)
def test_refuses(generated, reference, options, message):
    with pytest.raises(ValueError, match=message):
        motion_fidelity(generated, reference, **options)
