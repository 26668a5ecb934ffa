"""Tables of an evaluation, made from its result files alone."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corrdit.evaluation.results import EvaluationResults
from corrdit.evaluation.summary import TrackerSummary, is_scored, summarise
from corrdit.files import write_json, written_beside
from corrdit.metrics.tapvid import METRIC_NAMES

TABLE_NAME = "table"
VIDEOS_FILE = "videos.csv"


def write_tables(output: str | os.PathLike[str]) -> list[TrackerSummary]:
    """Write `table.json` and `table.csv` (one row a tracker) and `videos.csv` (one row a video and tracker).

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
    summaries, rows = [], []
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
    table = {"data": settings["data"], "trackers": [summary.as_dict() for summary in summaries]}
    write_json(results.path / f"{TABLE_NAME}.json", table)
    _write_csv(results.path / f"{TABLE_NAME}.csv", [_tracker_row(summary) for summary in summaries])
    _write_csv(results.path / VIDEOS_FILE, rows)
    return summaries


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with written_beside(path, "w") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def _tracker_row(summary: TrackerSummary) -> dict[str, Any]:
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


def _video_row(label: str, video: str, record: Mapping[str, Any] | None, failure: str | None) -> dict[str, Any]:
    status = "left" if failure is None else "broken"
    if record is not None:
        status = "scored" if is_scored(record) else "no visible points"
    found = record or {}
    figures = found.get("figures") or {}
    return {
        "tracker": label,
        "video": video,
        "status": status,
        **{name: found.get(name) for name in ("frames", "height", "width", "queries")},
        **{name: figures.get(name) for name in METRIC_NAMES},
        "error": failure if record is None else None,
    }
