"""Which way the sprite of a video moves, by block matching: knows nothing of the model, the prompt or the scene.

Patches of pixels go from each frame to the next and back. Where they return, the most common displacement and what fits
an affine map with it is the background; of what moves otherwise, the most common displacement is the sprite's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from transfer_world import followed_patches

from corrdit.integrations.embedded.world.scene import DIRECTIONS

SPACING = 2
RADIUS, REACH = 3, 7
RETURN_PIXELS = 1.5
APART_PIXELS = 1.25
TOGETHER_PIXELS = 1.5
LEAST_POINTS = 10
REFITS = 6


@dataclass(frozen=True)
class SpriteMotion:
    """velocity [2]: (dx, dy) in pixels a frame, NaN where nothing moves apart from the background; points: how many
    displacements agree on it, over all frames."""

    velocity: np.ndarray
    points: int


def returning_patches(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places [P, 2] and displacements [P, 2] of the patches that are found again and lead back.

    before, after: uint8 [H, W, 3].
    """
    height, width = before.shape[:2]
    columns, rows = (np.arange(SPACING // 2, side, SPACING) + 0.5 for side in (width, height))
    start = np.stack(np.meshgrid(columns, rows), axis=-1).reshape(-1, 2).astype(np.float32)
    there = followed_patches(np.stack([before, after]), start, radius=RADIUS, reach=REACH)[:, 1]
    back = followed_patches(np.stack([after, before]), there, radius=RADIUS, reach=REACH)[:, 1]
    kept = np.linalg.norm(back - start, axis=1) <= RETURN_PIXELS
    return start[kept], (there - start)[kept]


def most_common(displacements: np.ndarray, radius: float) -> np.ndarray:
    """Which displacements [P, 2] lie within `radius` of the one that most others lie near: bool [P]."""
    distance = np.linalg.norm(displacements[:, None] - displacements[None], axis=-1)
    return distance[(distance <= radius).sum(1).argmax()] <= radius


def apart_from_background(places: np.ndarray, displacements: np.ndarray) -> np.ndarray:
    """The displacements that an affine map of the background does not explain, [Q, 2]."""
    inside = most_common(displacements, APART_PIXELS)
    design = np.concatenate([places - places.mean(0), np.ones((len(places), 1))], axis=1)
    for _ in range(REFITS):
        solution = np.linalg.lstsq(design[inside], displacements[inside], rcond=None)[0]
        left = np.linalg.norm(displacements - design @ solution, axis=1)
        inside = left <= APART_PIXELS
        if inside.sum() < LEAST_POINTS:
            return displacements[:0]
    return displacements[~inside]


def sprite_motion(video: np.ndarray) -> SpriteMotion:
    """The motion of the largest thing that moves apart from the background.

    video: uint8 [T, H, W, 3]. Raises ValueError for a single frame.
    """
    if len(video) < 2:
        raise ValueError(f"motion needs at least two frames, got a video of shape {video.shape}")
    apart = []
    for before, after in itertools.pairwise(video):
        places, displacements = returning_patches(before, after)
        if len(places) >= LEAST_POINTS:
            apart.append(apart_from_background(places, displacements))
    found = np.concatenate(apart) if apart else np.zeros((0, 2))
    agreeing = most_common(found, TOGETHER_PIXELS) if len(found) else np.zeros(0, dtype=bool)
    if agreeing.sum() < LEAST_POINTS:
        return SpriteMotion(np.full(2, np.nan), int(agreeing.sum()))
    return SpriteMotion(found[agreeing].mean(0), int(agreeing.sum()))


def angle_to(velocity: np.ndarray, direction: str) -> float:
    """Degrees, 0 to 180, between a velocity and a direction in words; 180 for a velocity of NaN or 0."""
    length = float(np.linalg.norm(velocity))
    if not length > 0:
        return 180.0
    cosine = float(np.dot(velocity, DIRECTIONS[direction])) / length
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))
