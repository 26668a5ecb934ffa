"""One figure for each layer and step out of DiffTrack's three."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from corrdit.arguments import real_array


def harmonic_mean(accuracy: ArrayLike, confidence: ArrayLike, attention: ArrayLike) -> np.ndarray:
    """Harmonic mean of matching accuracy, confidence score and attention score, each min-max normalised first.

    DiffTrack's criterion for the best layer and timestep (Nam et al., "Emergent Temporal Correspondences from Video
    Diffusion Transformers", 2025). It is relative: the worst entry of any table becomes 0, and so does the mean there.

    Args:
        accuracy, confidence, attention: `[layers, steps]` each, any unit.

    Returns:
        float64 `[layers, steps]`, 0 to 1.

    Raises:
        ValueError: tables of different shapes, NaN, or a table whose entries are all equal.
    """
    tables = {"accuracy": accuracy, "confidence": confidence, "attention": attention}
    normalised = [_min_max(name, np.asarray(table), np.shape(accuracy)) for name, table in tables.items()]
    smallest = np.minimum.reduce(normalised)
    inverse = sum(1 / np.where(smallest > 0, table, 1) for table in normalised)
    return np.where(smallest > 0, len(normalised) / inverse, 0.0)


def _min_max(name: str, table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if table.ndim != 2 or table.shape != shape or table.size == 0:
        raise ValueError(f"{name} must have shape [layers, steps], the same for all three tables, got {table.shape}")
    table = real_array(name, table)
    low, high = table.min(), table.max()
    if low == high:
        raise ValueError(
            f"{name} is {low} everywhere, so it cannot be normalised by its smallest and largest entry; "
            "give at least two layers or steps that differ"
        )
    return (table - low) / (high - low)
