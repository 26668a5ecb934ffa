"""The TAP-Vid metric as a torchmetrics module: right for batches, empty visibility and several processes.

Needs torchmetrics; imported only when `corrdit.metrics.TapVidMetric` is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torchmetrics import Metric

from corrdit.arguments import choice
from corrdit.metrics.tapvid import METRIC_NAMES, QUERY_MODES, tapvid

UNNAMED = -1.0
Arrays: TypeAlias = "np.ndarray | torch.Tensor | Sequence[ArrayLike]"


class TapVidMetric(Metric):
    """Mean of TAP-Vid's metric over videos.

    Every video has the same weight, whatever its number of points and however videos are batched. A video in which no
    visible point is scored has no published figure: it is counted and left out of every mean. A video that is given
    twice under one name, as Lightning's own distributed sampler does when counts are uneven, counts once. Videos are
    summed in an order that depends on their names only, so that with names the figures are bit-identical for any number
    of processes.

    `compute` gives a dict of float64 scalars: the names of `corrdit.metrics.tapvid`, and `videos` (in the means) and
    `videos_without_visible_points` (left out). Without any video the means are NaN.

    Args:
        query_mode: "first" or "strided".
        **kwargs: torchmetrics' own (process group, synchronisation).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    records: list[torch.Tensor]

    def __init__(self, query_mode: str = "first", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        choice("query_mode", query_mode, QUERY_MODES)
        self.query_mode = query_mode
        self.add_state("records", default=[], dist_reduce_fx="cat")

    def update(
        self,
        query_points: Arrays,
        gt_occluded: Arrays,
        gt_tracks: Arrays,
        pred_occluded: Arrays,
        pred_tracks: Arrays,
        videos: Sequence[str] | None = None,
    ) -> None:
        """Add videos.

        Args:
            query_points, gt_occluded, gt_tracks, pred_occluded, pred_tracks: as `corrdit.metrics.tapvid` takes them, or
                lists with one entry a video (`[n, 3]`, `[n, t]`, `[n, t, 2]`, ...) where videos differ in size.
            videos: names of the videos; without them none is recognised as a repetition.

        Raises:
            ValueError: as `corrdit.metrics.tapvid`, or another number of names than of videos. Nothing is added then.
        """
        batches = _by_video(query_points, gt_occluded, gt_tracks, pred_occluded, pred_tracks)
        if videos is not None and len(videos) != len(batches):
            raise ValueError(f"videos names {len(videos)} videos, the arrays hold {len(batches)}")
        names = [UNNAMED] * len(batches) if videos is None else [_identity(name) for name in videos]
        rows = []
        for name, (query, occluded, tracks, guessed_occluded, guessed_tracks) in zip(names, batches, strict=True):
            figures = tapvid(query, occluded, tracks, guessed_occluded, guessed_tracks, self.query_mode)
            rows.append([name, *(float(figures[key][0]) for key in METRIC_NAMES)])
        self.records.append(torch.tensor(rows, dtype=torch.float64, device=self.device))

    def compute(self) -> dict[str, torch.Tensor]:
        """Means over the videos of all processes."""
        records = [self.records] if isinstance(self.records, torch.Tensor) else self.records
        rows = torch.cat([_no_record(self.device), *records]).cpu().numpy()
        rows = _without_repetitions(rows[np.lexsort(rows.T[::-1])])
        counted = rows[~np.isnan(rows[:, 1 + METRIC_NAMES.index("average_pts_within_thresh")]), 1:]
        means = counted.mean(axis=0) if len(counted) else np.full(len(METRIC_NAMES), np.nan)
        figures = dict(zip(METRIC_NAMES, means, strict=True))
        figures |= {"videos": len(counted), "videos_without_visible_points": len(rows) - len(counted)}
        return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in figures.items()}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the videos of all processes; one without any takes part with an empty table of the same type."""
        if not self.records:
            self.records.append(_no_record(self.device))
        super().sync(*args, **kwargs)


def _no_record(device: torch.device) -> torch.Tensor:
    return torch.zeros(0, 1 + len(METRIC_NAMES), dtype=torch.float64, device=device)


def _by_video(*arrays: Arrays) -> list[list[np.ndarray]]:
    """The arrays of each video, with a leading axis of one."""
    listed = [[_array(entry)[None] for entry in given] for given in arrays]
    sizes = {len(entries) for entries in listed}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"the five arrays must hold the same number of videos, at least one, got {[len(e) for e in listed]}"
        )
    return [list(entries) for entries in zip(*listed, strict=True)]


def _array(value: object) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _identity(name: str) -> float:
    """48 bits of a hash of the name: whole numbers that float64 holds exactly."""
    return float(int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:6], "big"))


def _without_repetitions(rows: np.ndarray) -> np.ndarray:
    """Sorted rows without those whose name was seen; unnamed rows all stay."""
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (rows[1:, 0] != rows[:-1, 0]) | (rows[1:, 0] == UNNAMED)
    return rows[first]
