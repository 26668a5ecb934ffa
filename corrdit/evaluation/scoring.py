"""One video through one tracker: figures, or the reason why there are none, and its tracks drawn."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from corrdit.arguments import whole_number
from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation.results import file_name
from corrdit.evaluation.trackers import Track
from corrdit.files import OutputFolder
from corrdit.memory import first_line, is_out_of_memory
from corrdit.metrics import tapvid
from corrdit.tracking import Tracks
from corrdit.visualization import TrackStyle, write_track_pictures

QUERIES_AT_ONCE = 4096
FRAMES_A_SECOND = 10.0
TRAIL = 15


@dataclass(frozen=True)
class Outcome:
    """What a tracker made of a video.

    Args:
        record: for `EvaluationResults.write_record`: numbers of frames and queries, seconds, and `figures`: TAP-Vid's
            metric by name, None where there is no case for a ratio.
        tracks: of the queries, in pixels of the video; None for a video without queries.
    """

    record: dict[str, Any]
    tracks: Tracks | None


def evaluate_video(track: Track, sample: TapVidSample, *, queries_at_once: int | None = QUERIES_AT_ONCE) -> Outcome:
    """Track the queries of a video and measure the tracks.

    A video without queries has no figures.

    Args:
        track: the tracker.
        sample: video, queries and truth.
        queries_at_once: most queries the tracker is given together; None for all.

    Raises:
        ValueError: what the tracker or the metric refuses, results that are not finite, or queries for which there is
            not enough memory.
    """
    began = time.perf_counter()
    frames, height, width = (int(size) for size in sample.video.shape[:3])
    record = {"video": sample.name, "frames": frames, "height": height, "width": width, "queries": len(sample.queries)}
    if not len(sample.queries):
        return Outcome({**record, "seconds": 0.0, "figures": None}, None)
    try:
        tracks = track_in_parts(track, sample.video, queries_inside(sample), queries_at_once)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"there is not enough memory for {len(sample.queries)} queries, {queries_at_once or 'all'} at once, in "
            f"{frames} frames of {height} x {width} ({first_line(error)}); give fewer at once, fewer frames or a "
            "smaller working size"
        ) from error
    figures = tapvid(**sample.metric_arguments(tracks))
    values = {name: None if math.isnan(value[0]) else float(value[0]) for name, value in figures.items()}
    return Outcome({**record, "seconds": round(time.perf_counter() - began, 3), "figures": values}, tracks)


def queries_inside(sample: TapVidSample) -> np.ndarray:
    """Queries `[Q, 3]` (frame, x, y) moved into the frame: annotators may click a little outside, trackers refuse that.

    The place of a query is never scored.
    """
    extent = [sample.video.shape[2], sample.video.shape[1]]
    return np.concatenate([sample.queries[:, :1], sample.queries[:, 1:].clip(0, extent)], axis=1)


def track_in_parts(track: Track, video: np.ndarray, queries: np.ndarray, queries_at_once: int | None) -> Tracks:
    """Tracks of any number of queries, so many at a time; those of one frame stay together where they can.

    Args:
        track: the tracker.
        video: uint8 `[T, H, W, 3]`.
        queries: `[P, 3]` (frame, x, y).
        queries_at_once: at least 1, or None for all together.

    Returns:
        Tracks in the order of the queries.
    """
    limit = len(queries) if queries_at_once is None else whole_number("queries_at_once", queries_at_once, 1)
    if len(queries) <= limit:
        return track(video, queries)
    order = np.argsort(queries[:, 0], kind="stable")
    parts = [track(video, queries[order[start : start + limit]]) for start in range(0, len(order), limit)]
    back = torch.from_numpy(np.argsort(order, kind="stable"))
    joined = [torch.cat([getattr(part, name) for part in parts], dim=1)[:, back] for name in ("xy", "visible", "score")]
    return Tracks(*joined)


def draw_tracks(folder: str | os.PathLike[str], sample: TapVidSample, tracks: Tracks, *, trail: int = TRAIL) -> None:
    """Write `VIDEO.mp4` and the contact sheet `VIDEO.png` into a folder, which is made if need be.

    Args:
        folder: for both.
        sample: the video.
        tracks: of its queries.
        trail: past frames whose path is drawn behind a point.
    """
    name = file_name(sample.name)
    with OutputFolder(folder) as hidden:
        write_track_pictures(
            sample.video,
            tracks,
            (sample.video.shape[1], sample.video.shape[2]),
            queries=sample.queries,
            fps=FRAMES_A_SECOND,
            video_path=hidden / f"{name}.mp4",
            sheet_path=hidden / f"{name}.png",
            style=TrackStyle(trail=trail),
        )


def true_tracks(sample: TapVidSample) -> Tracks:
    """The annotation as tracks; where a point is hidden its place is that of the query, if the set gives none."""
    known = np.isfinite(sample.tracks).all(axis=2, keepdims=True)
    xy = np.where(known, sample.tracks, sample.queries[:, None, 1:]).transpose(1, 0, 2)
    visible = ~sample.occluded.T & known[..., 0].T
    return Tracks(*map(torch.from_numpy, (xy, visible, np.ones(visible.shape, np.float32))))
