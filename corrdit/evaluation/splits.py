"""Figures of the points that move much or little, and of those that come back after they were hidden.

Bounds, and means over points of all videos together, as in the released evaluation of DiTracker, "Repurposing Video
Diffusion Transformers for Robust Point Tracking" (arXiv 2512.20606).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from corrdit.data.tapvid import TapVidSample
from corrdit.metrics import tapvid
from corrdit.tracking import Tracks

MOTION = {"still": 0.0, "slow": 0.005, "medium": 0.015, "fast": 0.05}
"""Least mean step a frame, between annotated frames that follow each other and in both of which the point is visible,
as a share of the diagonal of the frame."""
REAPPEARANCES = {"never back": 0, "back once or twice": 1, "back more often": 3}
"""Least number of times that a point is visible after an annotated frame in which it was not."""
SPLIT_FIGURES = ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy")


def point_splits(sample: TapVidSample) -> dict[str, dict[str, np.ndarray]]:
    """For "motion" and "reappearance", by the name of each part, bool `[Q]` of the queries in it."""
    frames = sample.annotated_frames()
    visible = ~sample.occluded[:, frames]
    extent = np.array([sample.video.shape[2], sample.video.shape[1]])
    both = visible[:, 1:] & visible[:, :-1]
    steps = np.linalg.norm(np.diff(sample.tracks[:, frames] / extent, axis=1), axis=-1) / np.sqrt(2) / np.diff(frames)
    motion = np.where(both, steps, 0).sum(axis=1) / both.sum(axis=1).clip(min=1)
    back = (visible[:, 1:] & ~visible[:, :-1]).sum(axis=1)
    return {"motion": _parts(motion, MOTION), "reappearance": _parts(back, REAPPEARANCES)}


def split_sums(sample: TapVidSample, tracks: Tracks) -> dict[str, dict[str, Any]]:
    """TAP-Vid's figures of every point by itself, added up over the points of each part of `point_splits`.

    Returns:
        `{"motion still": {"points": n, FIGURE: [sum, points that have it], ...}, ...}`.
    """
    arguments = sample.metric_arguments(tracks)
    single = {name: value[0][:, None] if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    figures = tapvid(**single)
    sums: dict[str, dict[str, Any]] = {}
    for kind, parts in point_splits(sample).items():
        for part, chosen in parts.items():
            row: dict[str, Any] = {"points": int(chosen.sum())}
            for name in SPLIT_FIGURES:
                values = figures[name][chosen]
                known = values[~np.isnan(values)]
                row[name] = [float(known.sum()), len(known)]
            sums[f"{kind}: {part}"] = row
    return sums


def split_rows(tracker: str, records: Iterable[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Rows of a table: the figures of a tracker for each part, over the points of all videos."""
    totals: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for part, row in (record.get("splits") or {}).items():
            total = totals.setdefault(part, {"points": [0], **{name: [0, 0] for name in SPLIT_FIGURES}})
            total["points"][0] += row["points"]
            for name in SPLIT_FIGURES:
                total[name] = [before + more for before, more in zip(total[name], row[name], strict=True)]
    return [
        {
            "tracker": tracker,
            "split": part,
            "points": total["points"][0],
            **{name: total[name][0] / total[name][1] if total[name][1] else None for name in SPLIT_FIGURES},
        }
        for part, total in totals.items()
    ]


def _parts(values: np.ndarray, least: Mapping[str, float]) -> dict[str, np.ndarray]:
    bounds = [*least.values(), np.inf]
    return {name: (values >= bounds[place]) & (values < bounds[place + 1]) for place, name in enumerate(least)}
