"""Smooth motions that are no similarity: surfaces that tilt in perspective, bend and wave, with exact inverses.

A deformation maps a point of a surface's local frame, as the screen shows it, to the point of the undeformed surface:
first the perspective `l / (1 + tilt . l)`, then the bending `l + sum of waves`. The waves' slopes add up to less than
one, so that the bending is a contraction away from the identity: its inverse is a fixed point, found to the precision
of float64 (Banach), and the map is one to one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STEEPEST = 0.6
"""Largest sum of the waves' slopes."""
_ROUNDS = 60
_NEAREST = 0.05
"""Smallest share of its distance at which a tilted point is still in front of the camera."""


@dataclass(frozen=True)
class Deformation:
    """How a surface of T frames is deformed.

    tilt: [T, 2], per unit of length of the local frame, of the perspective. amplitude [T, K, 2], number [K, 2] and
    phase [T, K] of K waves `amplitude * sin(number . l + phase)`. Raises ValueError for waves steeper than STEEPEST.
    """

    tilt: np.ndarray
    amplitude: np.ndarray
    number: np.ndarray
    phase: np.ndarray

    def __post_init__(self) -> None:
        slopes = np.linalg.norm(self.amplitude, axis=-1) * np.linalg.norm(self.number, axis=-1)
        if slopes.size and slopes.sum(axis=1).max() > STEEPEST:
            raise ValueError(
                f"the slopes of the waves add up to {slopes.sum(axis=1).max():.3f}; accepted is at most {STEEPEST}, so "
                "that the motion can be inverted; give smaller amplitudes or wave numbers"
            )


def no_deformation(frames: int, waves: int = 0) -> Deformation:
    """A surface that keeps its form."""
    shapes = ((frames, 2), (frames, waves, 2), (waves, 2), (frames, waves))
    return Deformation(*(np.zeros(shape) for shape in shapes))


class Deformations:
    """Of N surfaces over T frames, for points [N, T, ..., 2]; each may be None."""

    def __init__(self, given: Sequence[Deformation | None], dtype: torch.dtype) -> None:
        present = [one for one in given if one is not None]
        self.rigid = not present
        if self.rigid:
            return
        length, waves = len(present[0].tilt), max(one.number.shape[0] for one in present)
        padded = [_with_waves(one or no_deformation(length), waves) for one in given]
        self.tilt, self.amplitude, self.number, self.phase = (
            torch.from_numpy(np.stack([getattr(one, name) for one in padded])).to(dtype)
            for name in ("tilt", "amplitude", "number", "phase")
        )

    def chosen(self, surfaces: Tensor, frames: Tensor) -> Deformations:
        """Those of surfaces int64 [M] at their frames int64 [M, T']."""
        if self.rigid:
            return self
        found = copy.copy(self)
        rows = surfaces[:, None]
        found.tilt, found.amplitude, found.phase = (
            values[rows, frames] for values in (self.tilt, self.amplitude, self.phase)
        )
        found.number = self.number[surfaces]
        return found

    def to_surface(self, local: Tensor) -> tuple[Tensor, Tensor | None]:
        """Points of the undeformed surfaces, and which of them are in front of the camera (None: all)."""
        if self.rigid:
            return local, None
        depth = 1 + (local * self._over_points(self.tilt, local)).sum(-1)
        places = local / depth.clamp(min=_NEAREST)[..., None]
        return places + self._bending(places), depth > _NEAREST

    def to_local(self, surface: Tensor) -> Tensor:
        """The inverse: where points [N, T', ..., 2] of the undeformed surfaces are in the local frames."""
        if self.rigid:
            return surface
        places = surface
        for _ in range(_ROUNDS):
            places = surface - self._bending(places)
        depth = 1 - (places * self._over_points(self.tilt, places)).sum(-1)
        return places / depth.clamp(min=_NEAREST)[..., None]

    def _bending(self, places: Tensor) -> Tensor:
        total = torch.zeros_like(places)
        for wave in range(self.number.shape[1]):
            number = self.number[:, None, wave].expand(self.tilt.shape)
            along = (places * self._over_points(number, places)).sum(-1)
            phase = self.phase[:, :, wave].reshape(*self.phase.shape[:2], *[1] * (along.ndim - 2))
            total = total + torch.sin(along + phase)[..., None] * self._over_points(self.amplitude[:, :, wave], places)
        return total

    @staticmethod
    def _over_points(values: Tensor, points: Tensor) -> Tensor:
        """Values [N, T', 2] with axes for the points of each frame."""
        return values.reshape(*values.shape[:2], *[1] * (points.ndim - 3), 2)


def _with_waves(one: Deformation, waves: int) -> Deformation:
    """With waves of no height added up to a number."""
    more = waves - one.number.shape[0]
    return Deformation(
        one.tilt,
        np.pad(one.amplitude, ((0, 0), (0, more), (0, 0))),
        np.pad(one.number, ((0, more), (0, 0))),
        np.pad(one.phase, ((0, 0), (0, more))),
    )
