"""Points by motion and by reappearance: which are in which part, and figures over the points of all videos."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from corrdit.cli import main
from corrdit.data import TapVidVideo
from corrdit.evaluation.splits import SPLIT_FIGURES, point_splits, split_rows, split_sums
from corrdit.metrics import tapvid
from corrdit.tracking.baselines import standing_still

FRAMES = 9


def made_sample():
    """Four points: at rest, 1 % of the diagonal a frame and hidden once, 6 % and hidden three times, hardly any."""
    steps = np.array([0.0, 0.01, 0.06, 0.004]) * np.sqrt(2)
    points = np.zeros((4, FRAMES, 2)) + 0.1
    points[..., 0] += steps[:, None] * np.arange(FRAMES)
    occluded = np.zeros((4, FRAMES), bool)
    occluded[1, 4] = True
    occluded[2, [1, 3, 5]] = True
    occluded[3, 7:] = True
    return TapVidVideo("made", np.zeros((FRAMES, 32, 48, 3), np.uint8), points, occluded).sample()


def test_points_are_in_the_parts_of_their_motion_and_their_returns():
    parts = point_splits(made_sample())
    motion = {name: np.flatnonzero(chosen).tolist() for name, chosen in parts["motion"].items()}
    # Steps from or to a frame in which a point is hidden do not count.
    assert motion == {"still": [0, 3], "slow": [1], "medium": [], "fast": [2]}
    returns = {name: np.flatnonzero(chosen).tolist() for name, chosen in parts["reappearance"].items()}
    assert returns["never back"] == [0, 3]
    assert returns["back once or twice"] == [1]
    assert returns["back more often"] == [2]


def test_figures_are_means_of_points_over_all_videos():
    sample = made_sample()
    tracks = standing_still(sample.queries, FRAMES)
    sums = split_sums(sample, tracks)
    rows = {row["split"]: row for row in split_rows("still", [{"splits": sums}, {"splits": sums}, {}])}
    assert rows["motion: still"]["points"] == 4
    single = []
    for index in (0, 3):
        arguments = sample.metric_arguments(tracks)
        part = {
            name: value[:, index : index + 1] if isinstance(value, np.ndarray) else value
            for name, value in arguments.items()
        }
        single.append(tapvid(**part))
    for name in SPLIT_FIGURES:
        assert rows["motion: still"][name] == pytest.approx(np.mean([figures[name][0] for figures in single]))
    assert rows["motion: medium"]["average_jaccard"] is None
    assert rows["motion: fast"]["average_pts_within_thresh"] < rows["motion: still"]["average_pts_within_thresh"]


def test_an_evaluation_writes_splits_and_corrupts_frames(davis, tmp_path):
    plain, worse = tmp_path / "plain", tmp_path / "worse"
    command = ["evaluate", "--data", str(davis), "--trackers", "patches", "--device", "cpu"]
    assert main([*command, "--output", str(plain)]) == 0
    assert main([*command, "--output", str(worse), "--corruption", "noise:5"]) == 0
    rows = list(csv.DictReader((plain / "splits.csv").open()))
    assert {row["tracker"] for row in rows} == {"patches"}
    assert {row["split"].split(":")[0] for row in rows} == {"motion", "reappearance"}
    counts = [sum(int(row["points"]) for row in rows if row["split"].startswith(kind)) for kind in ("motion", "reapp")]
    assert counts[0] == counts[1] > 0
    shares = [
        float(next(csv.DictReader((folder / "table.csv").open()))["average_pts_within_thresh"])
        for folder in (plain, worse)
    ]
    assert shares[1] < shares[0]
    assert main([*command, "--output", str(plain), "--corruption", "noise:5"]) == 2  # other settings
    assert main([*command, "--output", str(worse), "--corruption", "fog:1"]) == 2
