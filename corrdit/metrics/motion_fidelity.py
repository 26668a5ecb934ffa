"""How well the motion of one set of tracks is found in another.

Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (2024), equation 8; DiTFlow
scores with a variant of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from corrdit.arguments import choice, real_array

VARIANTS = ("two_sided", "released")
STATIONARY = ("match", "zero", "exclude", "error")
REST_RADIUS = 0.25
"""Pixels: a track that stays this near to its mean position is at rest. Trackers jitter by hundredths of a pixel on a
resting background, and a real motion crosses it within a few frames."""


def motion_fidelity(
    generated: ArrayLike,
    reference: ArrayLike,
    *,
    variant: str = "two_sided",
    stationary: str = "match",
    still_below: float = 0.0,
    rest_radius: float | None = None,
) -> float:
    """Mean similarity of each track's motion to the most similar track of the other video.

    The similarity of two tracks is the cosine between their displacements from frame to frame, averaged over the frame
    steps. A track at rest has no direction, only the noise of a tracker: it is as one that does not move at all, by
    default like rest (1) and unlike motion (0).

    Args:
        generated: `[P, F, 2]` (point, frame, (x, y)).
        reference: `[Q, F, 2]`; with `variant="released"` Q must be P.
        variant: "two_sided" averages the best match of every generated and of every reference track (the paper).
            "released" is DiTFlow's code: the identity is subtracted from the similarity matrix and only the
            generated tracks look for a match, so a track's own counterpart counts one less.
        stationary: what the cosine of a step without motion is; the released code divides by zero there.
            "match" counts 1 where both tracks stand still and 0 where one does; "zero" counts 0 for both;
            "exclude" leaves the step out of the average of that pair of tracks, and a pair without common moving step
            counts 0; "error" raises.
        still_below: a step not longer than this many pixels is without motion.
        rest_radius: a track that never leaves a circle of this radius in pixels round its mean position is at rest:
            all its steps are without motion. None for 0.25 pixels, or 0 with `variant="released"`, whose code knows
            no rest.

    Returns:
        The score, -1 to 1 ("released": -2 to 1).

    Raises:
        ValueError: shapes that do not fit, fewer than two frames, NaN, an unknown option, or, with
            `stationary="error"`, a track that stands still.
    """
    choice("variant", variant, VARIANTS)
    choice("stationary", stationary, STATIONARY)
    if not still_below >= 0:
        raise ValueError(f"still_below is a length in pixels and must not be negative, got {still_below!r}")
    if rest_radius is None:
        rest_radius = 0.0 if variant == "released" else REST_RADIUS
    if not rest_radius >= 0:
        raise ValueError(f"rest_radius is a length in pixels and must not be negative, got {rest_radius!r}")
    generated, reference = _checked("generated", generated), _checked("reference", reference)
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(
            f"generated has {generated.shape[1]} frames and reference {reference.shape[1]}; both need the same number"
        )
    if variant == "released" and len(generated) != len(reference):
        raise ValueError(
            f'variant="released" compares tracks one to one, got {len(generated)} generated and {len(reference)} '
            'reference tracks; give as many, or take variant="two_sided"'
        )
    similarity = _similarity(generated, reference, stationary, still_below, rest_radius)
    if variant == "released":
        return float((similarity - np.eye(len(similarity))).max(axis=1).mean())
    return float((similarity.max(axis=1).mean() + similarity.max(axis=0).mean()) / 2)


def _checked(name: str, tracks: ArrayLike) -> np.ndarray:
    tracks = np.asarray(tracks)
    if tracks.ndim != 3 or tracks.shape[2] != 2 or len(tracks) == 0 or tracks.shape[1] < 2:
        raise ValueError(
            f"{name} must have shape [points, frames, 2] with at least one point and two frames, got {tracks.shape}"
        )
    return real_array(name, tracks)


def _similarity(
    generated: np.ndarray, reference: np.ndarray, stationary: str, still_below: float, rest_radius: float
) -> np.ndarray:
    """Mean cosine of the displacements of each pair of tracks, `[P, Q]`."""
    both = (generated, reference)
    directions, moving = zip(*(_directions(tracks, still_below, rest_radius) for tracks in both), strict=True)
    if stationary == "error" and not all(steps.all() for steps in moving):
        still = [int((~steps).any(axis=1).sum()) for steps in moving]
        raise ValueError(
            f"{still[0]} generated and {still[1]} reference tracks stand still in some frame, where the direction of "
            'motion is undefined; drop them, or choose stationary="match", "zero" or "exclude"'
        )
    total = np.einsum("pfc,qfc->pq", *directions)
    steps = generated.shape[1] - 1
    if stationary == "exclude":
        common = np.einsum("pf,qf->pq", *(step.astype(np.float64) for step in moving))
        return total / np.maximum(common, 1)
    if stationary == "match":
        total += np.einsum("pf,qf->pq", *((~step).astype(np.float64) for step in moving))
    return total / steps


def _directions(tracks: np.ndarray, still_below: float, rest_radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit displacements `[P, F-1, 2]`, zero where still, and whether each step moves `[P, F-1]`."""
    displacement = np.diff(tracks, axis=1)
    length = np.linalg.norm(displacement, axis=-1)
    extent = np.linalg.norm(tracks - tracks.mean(axis=1, keepdims=True), axis=-1).max(axis=1, keepdims=True)
    moving = (length > still_below) & (extent > rest_radius)
    return displacement / np.where(moving, length, np.inf)[..., None], moving
