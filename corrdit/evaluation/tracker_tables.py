"""Means over videos with intervals, and the tables of an evaluation, made from its result files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from corrdit.evaluation.results import EvaluationResults
from corrdit.evaluation.splits import split_rows
from corrdit.files import write_csv, write_json
from corrdit.metrics.tapvid import METRIC_NAMES

TABLE_NAME = "table"
VIDEOS_FILE = "videos.csv"
SPLITS_FILE = "splits.csv"
RESAMPLES = 2000
LEVEL = 95
Record: TypeAlias = Mapping[str, Any]
"""Of a video, as `corrdit.evaluation.evaluate_video` gives it."""


@dataclass(frozen=True)
class TrackerSummary:
    """What a tracker reached on a set.

    Args:
        tracker: its label.
        videos: how many are in the means.
        figures: mean over these videos by the names of `corrdit.metrics.tapvid`; None without any video.
        intervals: lower and upper end of the 95 % bootstrap interval over videos, by the same names.
        without_visible_points: videos in which no visible point is scored; they have no figures.
        broken: videos that could not be evaluated, with the reason.
        left: videos that have not been evaluated yet.
    """

    tracker: str
    videos: int
    figures: dict[str, float | None]
    intervals: dict[str, tuple[float, float] | None]
    without_visible_points: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the figures beside the counts."""
        return {
            "tracker": self.tracker,
            "videos": self.videos,
            **self.figures,
            "intervals": {name: None if ends is None else list(ends) for name, ends in self.intervals.items()},
            "videos_without_visible_points": self.without_visible_points,
            "broken_videos": self.broken,
            "videos_left": self.left,
        }


def summarise(
    tracker: str, records: Sequence[Record], *, broken: Mapping[str, str] | None = None, left: Sequence[str] = ()
) -> TrackerSummary:
    """Means over videos, each with the same weight whatever its number of points, as TAP-Vid's are.

    A video without a scored visible point is counted and left out of every mean. The figures do not depend on the order
    of the records.

    Args:
        tracker: label.
        records: what `evaluate_video` gave, one a video.
        broken, left: names of videos without records, and for broken ones the reasons.

    Raises:
        ValueError: two records of one video.
    """
    ordered = sorted(records, key=lambda record: str(record["video"]))
    names = [record["video"] for record in ordered]
    if len(set(names)) < len(names):
        raise ValueError(f"tracker {tracker} has more than one record of a video")
    scored = [record["figures"] for record in ordered if is_scored(record)]
    # None becomes NaN.
    table = np.array([[figures[name] for name in METRIC_NAMES] for figures in scored], dtype=np.float64)
    table = table.reshape(len(scored), len(METRIC_NAMES))
    means = table.mean(axis=0) if scored else np.full(len(METRIC_NAMES), np.nan)
    low, high = _bootstrap(table)
    return TrackerSummary(
        tracker,
        len(scored),
        {name: _plain(mean) for name, mean in zip(METRIC_NAMES, means, strict=True)},
        {
            name: None if np.isnan(ends).any() else (float(ends[0]), float(ends[1]))
            for name, ends in zip(METRIC_NAMES, zip(low, high, strict=True), strict=True)
        },
        [record["video"] for record in ordered if not is_scored(record)],
        dict(sorted((broken or {}).items())),
        sorted(left),
    )


def is_scored(record: Record) -> bool:
    """Whether a record has figures that count: some visible point was scored."""
    figures = record["figures"]
    return figures is not None and figures["average_pts_within_thresh"] is not None


def write_tables(output: str | os.PathLike[str]) -> list[TrackerSummary]:
    """Write `table.json` and `table.csv` (one row a tracker), `videos.csv` (one row a video and tracker, with the
    interval over its points and PCK) and `splits.csv` (points by motion and reappearance, `corrdit.evaluation.splits`).

    The tables depend on nothing but the results, so that the same results give the same bytes however many processes
    made them.

    Args:
        output: the folder of an evaluation.

    Returns:
        The summaries, in the order of the trackers.

    Raises:
        ValueError: no `settings.json` of an evaluation in the folder, or a file in it that is none.
    """
    results = EvaluationResults(output)
    settings = results.settings()
    if not settings:
        raise ValueError(f"{output} holds no evaluation (no settings.json); give the --output of one")
    summaries, rows, splits = [], [], []
    for label in settings["trackers"]:
        records, broken, left = [], {}, []
        for video in settings["videos"]:
            reason = results.unmade(label, video, settings.get("inputs", {}).get(video))
            record = results.record(label, video) if reason is None else None
            failure = results.failure(label, video) or (f"{reason}; evaluate it again" if reason else None)
            rows.append(_video_row(label, video, record, failure))
            if record is not None:
                records.append(record)
            elif failure is not None:
                broken[video] = failure
            else:
                left.append(video)
        summaries.append(summarise(label, records, broken=broken, left=left))
        splits += split_rows(label, records)
    contents = {"data": settings["data"], "trackers": [summary.as_dict() for summary in summaries]}
    write_json(results.path / f"{TABLE_NAME}.json", contents)
    write_csv(results.path / f"{TABLE_NAME}.csv", [_tracker_row(summary) for summary in summaries])
    write_csv(results.path / VIDEOS_FILE, rows)
    write_csv(results.path / SPLITS_FILE, splits)
    return summaries


def _tracker_row(summary: TrackerSummary) -> dict[str, object]:
    ends: dict[str, float | None] = {}
    for name in ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy"):
        low, high = summary.intervals[name] or (None, None)
        ends |= {f"{name}_low": low, f"{name}_high": high}
    return {
        "tracker": summary.tracker,
        "videos": summary.videos,
        **summary.figures,
        **ends,
        "videos_without_visible_points": len(summary.without_visible_points),
        "broken_videos": len(summary.broken),
        "videos_left": len(summary.left),
    }


def _video_row(label: str, video: str, record: Record | None, failure: str | None) -> dict[str, object]:
    status = "left" if failure is None else "broken"
    if record is not None:
        status = "scored" if is_scored(record) else "no visible points"
    found = record or {}
    figures = found.get("figures") or {}
    low, high = found.get("points_interval") or (None, None)
    return {
        "tracker": label,
        "video": video,
        "status": status,
        **{name: found.get(name) for name in ("frames", "height", "width", "queries")},
        **{name: figures.get(name) for name in METRIC_NAMES},
        "average_pts_within_thresh_low": low,
        "average_pts_within_thresh_high": high,
        "pck": found.get("pck"),
        "error": failure if record is None else None,
    }


def _bootstrap(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of each column's mean over rows drawn again; the draw follows from the number of rows."""
    if not len(table):
        nothing = np.full(table.shape[1], np.nan)
        return nothing, nothing
    drawn = np.random.default_rng(0).integers(0, len(table), (RESAMPLES, len(table)))
    means = np.stack([table[rows].mean(axis=0) for rows in drawn])
    low, high = np.percentile(means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0)
    return low, high


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
