"""How far a motion is from the true one: direction and speed apart, and agreement of directions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class MotionError(NamedTuple):
    """Errors of motion.

    direction: mean angle to the true motion in degrees, weighted by the true speed; 90 for random directions.
    speed: mean absolute difference of speeds over the mean true speed.
    """

    direction: float
    speed: float


def motion_error(
    tracks: ArrayLike, truth: ArrayLike, *, visible: ArrayLike | None = None, still_below: float = 0.0
) -> MotionError:
    """Direction and speed error of tracks against the true tracks of the same points.

    Args:
        tracks: `[P, F, 2]` (point, frame, (x, y)).
        truth: `[P, F, 2]`.
        visible: bool `[P, F]`; a step counts where a point is visible at both of its ends. None counts all.
        still_below: true steps not longer than this have no direction.

    Returns:
        `MotionError`. A step of `tracks` without any motion counts as 90 degrees off.

    Raises:
        ValueError: shapes that differ or are not `[P, F, 2]` with two frames, numbers that are not finite, or no true
            step that moves.
    """
    tracks, truth = np.asarray(tracks, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if tracks.shape != truth.shape or tracks.ndim != 3 or tracks.shape[2] != 2 or tracks.shape[1] < 2:
        raise ValueError(
            "tracks and truth must have one shape [points, frames, 2] with at least two frames, got "
            f"{tracks.shape} and {truth.shape}"
        )
    if not (np.isfinite(tracks).all() and np.isfinite(truth).all()):
        raise ValueError("tracks and truth must be finite")
    step, wanted = np.diff(tracks, axis=1), np.diff(truth, axis=1)
    counted = np.ones(step.shape[:2], dtype=bool)
    if visible is not None:
        seen = np.asarray(visible, dtype=bool)
        counted = seen[:, 1:] & seen[:, :-1]
    speed, true_speed = np.linalg.norm(step, axis=-1), np.linalg.norm(wanted, axis=-1)
    moving = counted & (true_speed > still_below)
    if not moving.any():
        raise ValueError("no point of the truth moves while it is visible, so there is no direction to compare")
    angle = np.degrees(np.arccos(np.clip(_cosine(step, wanted), -1, 1)))
    weight = true_speed[moving]
    return MotionError(
        direction=float((angle[moving] * weight).sum() / weight.sum()),
        speed=float(np.abs(speed - true_speed)[counted].sum() / true_speed[counted].sum()),
    )


def direction_agreement(flow: ArrayLike, direction: ArrayLike) -> float:
    """(1 + cosine) / 2 between displacements and a known direction, averaged: 0.5 for random ones, 1 for exact ones.

    The scale of DiTFlow's appendix D, which moves the first frame of a clip in a known direction.

    Args:
        flow: `[..., 2]` (dx, dy); vectors of length 0 agree by 0.5.
        direction: (dx, dy), or an array that broadcasts to `flow`.

    Raises:
        ValueError: not vectors, or a direction of length 0.
    """
    flow, direction = np.asarray(flow, dtype=np.float64), np.asarray(direction, dtype=np.float64)
    if flow.shape[-1:] != (2,) or direction.shape[-1:] != (2,) or flow.size == 0:
        raise ValueError(f"flow and direction must end in (dx, dy), got shapes {flow.shape} and {direction.shape}")
    if not (np.linalg.norm(direction, axis=-1) > 0).all():
        raise ValueError("direction has length 0")
    return float((1 + _cosine(flow, np.broadcast_to(direction, flow.shape))).mean() / 2)


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine over the last axis, 0 where a vector has no length."""
    length = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return (first * second).sum(-1) / np.where(length > 0, length, np.inf)
