"""One video through one tracker: figures, or the reason why there are none, and its tracks drawn."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from corrdit.arguments import whole_number
from corrdit.data.tapvid import METRIC_SIZE, TapVidSample
from corrdit.evaluation.results import file_name
from corrdit.evaluation.splits import split_sums
from corrdit.evaluation.trackers import Track
from corrdit.files import OutputFolder
from corrdit.memory import first_line, is_out_of_memory
from corrdit.metrics import tapvid
from corrdit.metrics.tapvid import THRESHOLDS
from corrdit.tracking import Tracks
from corrdit.visualization import TrackStyle, write_track_pictures

QUERIES_AT_ONCE = 4096
FRAMES_A_SECOND = 10.0
TRAIL = 15
RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """What a tracker made of a video.

    Args:
        record: for `EvaluationResults.write_record`: numbers of frames and queries, seconds, and `figures`: TAP-Vid's
            metric by name, None where there is no case for a ratio; `points_interval` and `pck` beside them.
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
    points = {
        "points_interval": points_interval(sample, tracks),
        "pck": share_of_correct_keypoints(sample, tracks),
        "splits": split_sums(sample, tracks),
    }
    seconds = round(time.perf_counter() - began, 3)
    return Outcome({**record, "seconds": seconds, "figures": values, **points}, tracks)


def queries_inside(sample: TapVidSample) -> np.ndarray:
    """Queries `[Q, 3]` (frame, x, y) moved into the frame: annotators may click a little outside, trackers refuse that.

    The place of a query is never scored.
    """
    extent = [sample.video.shape[2], sample.video.shape[1]]
    return np.concatenate([sample.queries[:, :1], sample.queries[:, 1:].clip(0, extent)], axis=1)


def points_interval(sample: TapVidSample, tracks: Tracks) -> tuple[float, float] | None:
    """95 % bootstrap interval of TAP-Vid's average share of points within the thresholds, over the video's points;
    None where no visible point is scored."""
    scored = _scored(sample)
    errors = _errors(sample, tracks) * METRIC_SIZE / np.array([sample.video.shape[2], sample.video.shape[1]])
    distance = np.linalg.norm(np.where(scored[..., None], errors, 0), axis=-1)
    near = np.mean([(distance < threshold) & scored for threshold in THRESHOLDS], axis=0).sum(axis=1)
    counted = scored.sum(axis=1)
    if not counted.any():
        return None
    near, counted = near[counted > 0], counted[counted > 0]
    drawn = np.random.default_rng(0).integers(0, len(near), (RESAMPLES, len(near)))
    low, high = np.percentile(near[drawn].sum(axis=1) / counted[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def share_of_correct_keypoints(sample: TapVidSample, tracks: Tracks) -> float | None:
    """BADJA's PCK: the share of visible points within .2 sqrt(area of the object's mask), in frames that have a mask;
    None where none has."""
    if sample.reach is None:
        return None
    scored = _scored(sample) & np.isfinite(sample.reach).all(axis=-1)
    if not scored.any():
        return None
    distance = np.linalg.norm(_errors(sample, tracks) / sample.reach, axis=-1)
    return float((distance[scored] <= 1).mean())


def _scored(sample: TapVidSample) -> np.ndarray:
    """Visible points in the frames that TAP-Vid scores, bool `[Q, T]`."""
    frame, asked = np.arange(len(sample.video)), np.rint(sample.queries[:, :1])
    return ~sample.occluded & (frame > asked if sample.metric_mode == "first" else frame != asked)


def _errors(sample: TapVidSample, tracks: Tracks) -> np.ndarray:
    """From the true to the found place, `[Q, T, 2]` in pixels of the video."""
    return tracks.xy.numpy().transpose(1, 0, 2).astype(np.float64) - sample.tracks


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


def draw_tracks(
    folder: str | os.PathLike[str],
    sample: TapVidSample,
    tracks: Tracks,
    *,
    trail: int = TRAIL,
    numbers: Sequence[int] | None = None,
) -> None:
    """Write `VIDEO.mp4` and the contact sheet `VIDEO.png` into a folder, which is made if need be.

    Args:
        folder: for both.
        sample: the video.
        tracks: of its queries.
        trail: past frames whose path is drawn behind a point.
        numbers: of the frames, as the sheet calls them; None counts them.
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
            numbers=numbers,
        )


def draw_truth(folder: str | os.PathLike[str], sample: TapVidSample, *, trail: int = TRAIL) -> None:
    """As `draw_tracks`, of the annotation, over the frames that have one."""
    kept = sample.annotated_frames()
    times = np.searchsorted(kept, np.rint(sample.queries[:, :1]))
    shown = replace(
        sample,
        video=sample.video[kept],
        queries=np.concatenate([times, sample.queries[:, 1:]], axis=1),
        tracks=sample.tracks[:, kept],
        occluded=sample.occluded[:, kept],
        annotated=None,
    )
    draw_tracks(folder, shown, true_tracks(shown), trail=trail, numbers=kept.tolist())


def true_tracks(sample: TapVidSample) -> Tracks:
    """The annotation as tracks; where a point is hidden its place is that of the query, if the set gives none."""
    known = np.isfinite(sample.tracks).all(axis=2, keepdims=True)
    xy = np.where(known, sample.tracks, sample.queries[:, None, 1:]).transpose(1, 0, 2)
    visible = ~sample.occluded.T & known[..., 0].T
    return Tracks(*map(torch.from_numpy, (xy, visible, np.ones(visible.shape, np.float32))))
