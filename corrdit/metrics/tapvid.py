"""The TAP-Vid metric: accuracy of positions and of visibility at five pixel thresholds.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video" (2022), section 4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from corrdit.arguments import choice, real_array

THRESHOLDS = (1, 2, 4, 8, 16)
QUERY_MODES = ("first", "strided")
METRIC_NAMES = (
    "occlusion_accuracy",
    *(f"{kind}_{threshold}" for threshold in THRESHOLDS for kind in ("pts_within", "jaccard")),
    "average_jaccard",
    "average_pts_within_thresh",
)


def tapvid(
    query_points: ArrayLike,
    gt_occluded: ArrayLike,
    gt_tracks: ArrayLike,
    pred_occluded: ArrayLike,
    pred_tracks: ArrayLike,
    query_mode: str,
) -> dict[str, np.ndarray]:
    """TAP-Vid's published metric, one value a video.

    Positions are compared in the pixels they are given in; published figures are for frames of 256 x 256. The query
    frame itself is never scored. With `query_mode="first"` the frames after it are, with "strided" all others.

    Args:
        query_points: `[b, n, 3]`, (t, y, x); only the frame t is used, rounded to the nearest whole number.
        gt_occluded: bool `[b, n, t]`.
        gt_tracks: `[b, n, t, 2]`, (x, y).
        pred_occluded: bool `[b, n, t]`.
        pred_tracks: `[b, n, t, 2]`, (x, y).
        query_mode: "first" or "strided".

    Returns:
        float64 `[b]` each: `occlusion_accuracy`; `pts_within_d` (share of visible points nearer than d) and
        `jaccard_d` (true positives over true positives, misses and false alarms) for d = 1, 2, 4, 8, 16;
        `average_jaccard` and `average_pts_within_thresh` over the five. A ratio without cases, such as `pts_within_1`
        of a video without visible points, is NaN, as published.

    Raises:
        ValueError: shapes that do not fit together, occlusion that is not boolean, a query frame outside the video, a
            predicted position or a visible true position that is not finite, or an unknown query mode.
    """
    query_frames, occluded, tracks, guessed_occluded, guessed_tracks = _checked(
        query_points, gt_occluded, gt_tracks, pred_occluded, pred_tracks, query_mode
    )
    frame = np.arange(occluded.shape[2])
    after = frame > query_frames[..., None]
    scored = after if query_mode == "first" else frame != query_frames[..., None]
    visible, guessed_visible = ~occluded, ~guessed_occluded

    metrics = {"occlusion_accuracy": _ratio(_count((guessed_occluded == occluded) & scored), _count(scored))}
    distance = np.square(guessed_tracks - np.where(visible[..., None], tracks, 0)).sum(-1)
    visible_cases = _count(visible & scored)
    for threshold in THRESHOLDS:
        within = distance < threshold**2
        correct = within & visible
        true_positives = _count(correct & guessed_visible & scored)
        false_positives = _count(guessed_visible & ~correct & scored)
        metrics[f"pts_within_{threshold}"] = _ratio(_count(correct & scored), visible_cases)
        metrics[f"jaccard_{threshold}"] = _ratio(true_positives, visible_cases + false_positives)
    for average, kind in (("average_jaccard", "jaccard"), ("average_pts_within_thresh", "pts_within")):
        metrics[average] = np.mean([metrics[f"{kind}_{threshold}"] for threshold in THRESHOLDS], axis=0)
    return metrics


def _checked(
    query_points: ArrayLike,
    gt_occluded: ArrayLike,
    gt_tracks: ArrayLike,
    pred_occluded: ArrayLike,
    pred_tracks: ArrayLike,
    query_mode: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Query frames int64 `[b, n]` and the four arrays, after all checks."""
    choice("query_mode", query_mode, QUERY_MODES)
    occluded = np.asarray(gt_occluded)
    if occluded.ndim != 3 or 0 in occluded.shape[::2]:
        raise ValueError(
            f"gt_occluded must have shape [videos, points, frames] with a video and a frame, got {occluded.shape}"
        )
    given = {
        "query_points": (np.asarray(query_points), (*occluded.shape[:2], 3)),
        "gt_tracks": (np.asarray(gt_tracks), (*occluded.shape, 2)),
        "pred_occluded": (np.asarray(pred_occluded), occluded.shape),
        "pred_tracks": (np.asarray(pred_tracks), (*occluded.shape, 2)),
    }
    for name, (array, shape) in given.items():
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit gt_occluded {occluded.shape}, got {array.shape}")
    for name, array in (("gt_occluded", occluded), ("pred_occluded", given["pred_occluded"][0])):
        if array.dtype != np.bool_:
            raise ValueError(f"{name} must be boolean, got {array.dtype}; compare with a threshold first")
    for name in ("query_points", "gt_tracks"):
        if given[name][0].dtype.kind not in "fiu":
            raise ValueError(f"{name} must be real numbers, got {given[name][0].dtype}")
    tracks, guessed = given["gt_tracks"][0].astype(np.float64), real_array("pred_tracks", given["pred_tracks"][0])
    if not np.isfinite(tracks[~occluded]).all():
        raise ValueError("gt_tracks holds NaN or infinite positions where gt_occluded says the point is visible")
    return (
        _query_frames(given["query_points"][0], occluded.shape[2]),
        occluded,
        tracks,
        given["pred_occluded"][0],
        guessed,
    )


def _query_frames(query_points: np.ndarray, frames: int) -> np.ndarray:
    times = query_points[..., 0].astype(np.float64)
    rounded = np.round(times)
    if not (np.isfinite(times).all() and (rounded >= 0).all() and (rounded < frames).all()):
        raise ValueError(
            f"query_points (t, y, x) must have frames t from 0 to {frames - 1}, got {times.min()} to {times.max()}"
        )
    return rounded.astype(np.int64)


def _count(cases: np.ndarray) -> np.ndarray:
    """Cases in each video, `[b]`."""
    return cases.sum(axis=(1, 2))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where there is no case."""
    quotient = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=quotient, where=whole > 0)
    return quotient
