"""TAP-Vid's metric against the published one, by hand, and over batches and processes."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from corrdit import metrics
from corrdit.metrics.tapvid import METRIC_NAMES

PROCESS = pathlib.Path(__file__).with_name("metric_process.py")


def example(seed: int = 0, videos: int = 3, points: int = 5, frames: int = 7) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    tracks = random.uniform(0, 256, (videos, points, frames, 2))
    query = np.concatenate(
        [random.integers(0, frames - 1, (videos, points, 1)), random.uniform(0, 256, (videos, points, 2))], -1
    )
    return [
        query,
        random.random((videos, points, frames)) < 0.3,
        tracks,
        random.random((videos, points, frames)) < 0.3,
        tracks + random.normal(0, 4, tracks.shape),
    ]


@pytest.mark.parametrize("case", ["51_first", "51_strided", "52_first", "52_strided"])
def test_equals_the_published_metric(golden, case):
    reference = golden("tapvid_metrics")
    names = ("query_points", "gt_occluded", "gt_tracks", "pred_occluded", "pred_tracks")
    figures = metrics.tapvid(*(reference[f"{case}_{name}"] for name in names), case.split("_")[1])
    published = {key.removeprefix(f"{case}_m_"): value for key, value in reference.items() if f"{case}_m_" in key}
    assert set(figures) == set(published) == set(METRIC_NAMES)
    for key, value in published.items():
        assert figures[key].shape == value.shape
        assert np.abs(figures[key] - value).max() < 1e-9, key


def test_a_case_worked_by_hand():
    # One point, four frames, queried at frame 1. True: visible, query, visible, occluded. Guessed: off by 3 pixels and
    # visible in frame 0, exact in frame 2, visible in frame 3.
    query = np.array([[[1.0, 10, 10]]])
    occluded = np.array([[[False, False, False, True]]])
    tracks = np.full((1, 1, 4, 2), 10.0)
    guess = tracks.copy()
    guess[0, 0, 0, 0] += 3
    guessed_occluded = np.zeros((1, 1, 4), bool)
    first = metrics.tapvid(query, occluded, tracks, guessed_occluded, guess, "first")
    assert first["occlusion_accuracy"][0] == 0.5
    assert first["pts_within_1"][0] == 1.0
    assert first["jaccard_1"][0] == 0.5
    strided = metrics.tapvid(query, occluded, tracks, guessed_occluded, guess, "strided")
    assert math.isclose(strided["occlusion_accuracy"][0], 2 / 3)
    assert [strided[f"pts_within_{d}"][0] for d in (1, 2, 4)] == [0.5, 0.5, 1.0]
    # A distance of exactly d is not within d.
    guess[0, 0, 0, 0] = 14
    assert metrics.tapvid(query, occluded, tracks, guessed_occluded, guess, "strided")["pts_within_4"][0] == 0.5
    # At d = 1: one hit; two visible cases and two false alarms (frames 0 and 3). At d = 4: two hits, one false alarm.
    assert math.isclose(strided["jaccard_1"][0], 1 / 4)
    assert math.isclose(strided["jaccard_4"][0], 2 / 3)


def test_a_batch_gives_what_its_videos_give_alone():
    arrays = example()
    together = metrics.tapvid(*arrays, "strided")
    for video in range(3):
        alone = metrics.tapvid(*(array[video : video + 1] for array in arrays), "strided")
        for key, value in alone.items():
            assert value[0] == together[key][video]


def test_without_visible_points_ratios_are_nan_and_nothing_warns():
    arrays = example(videos=1)
    arrays[1][:] = True
    arrays[2][:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = metrics.tapvid(*arrays, "first")
    assert np.isnan(figures["pts_within_1"]).all()
    assert np.isnan(figures["average_pts_within_thresh"]).all()
    assert figures["jaccard_1"][0] == 0
    assert 0 <= figures["occlusion_accuracy"][0] <= 1


def broken(index: int, change) -> list[np.ndarray]:
    arrays = example()
    arrays[index] = change(arrays[index])
    return arrays


@pytest.mark.parametrize(
    "arrays, mode, message",
    [
        (example(), "last", "query_mode must be one of"),
        (broken(0, lambda q: q[..., :2]), "first", r"query_points must have shape \(3, 5, 3\)"),
        (broken(0, lambda q: q + 7), "first", "frames t from 0 to 6"),
        (broken(0, lambda q: q * np.nan), "first", "frames t from 0 to 6"),
        (broken(1, lambda o: o.astype(float)), "first", "gt_occluded must be boolean"),
        (broken(1, lambda o: o[0]), "first", r"gt_occluded must have shape \[videos, points, frames\]"),
        (broken(2, lambda t: t[:, :4]), "first", "gt_tracks must have shape"),
        (broken(2, lambda t: t * np.nan), "first", "gt_tracks holds NaN"),
        (broken(3, lambda o: o[..., :3]), "first", "pred_occluded must have shape"),
        (broken(4, lambda t: t * np.inf), "first", "pred_tracks holds 210 numbers"),
        (broken(4, lambda t: t.astype(str)), "first", "pred_tracks must be real numbers"),
    ],
)
def test_refuses(arrays, mode, message):
    with pytest.raises(ValueError, match=message):
        metrics.tapvid(*arrays, mode)


def test_torchmetrics_is_the_mean_over_videos_however_they_are_batched():
    arrays = example(videos=5)
    expected = {key: value.mean() for key, value in metrics.tapvid(*arrays, "first").items()}
    for sizes in ([5], [2, 3], [1, 1, 1, 1, 1]):
        metric = metrics.TapVidMetric("first")
        start = 0
        for size in sizes:
            metric.update(*(torch.from_numpy(array[start : start + size]) for array in arrays))
            start += size
        figures = metric.compute()
        assert figures["videos"] == 5
        for key, value in expected.items():
            assert figures[key].dtype == torch.float64
            assert math.isclose(figures[key].item(), value, abs_tol=1e-12)


def test_torchmetrics_takes_videos_of_different_sizes_and_resets():
    small, large = example(1, videos=1, points=2, frames=4), example(2, videos=1, points=9, frames=11)
    metric = metrics.TapVidMetric("strided")
    metric.update(*([a[0], b[0]] for a, b in zip(small, large, strict=True)))
    each = [metrics.tapvid(*arrays, "strided")["average_jaccard"][0] for arrays in (small, large)]
    assert math.isclose(metric.compute()["average_jaccard"].item(), np.mean(each), abs_tol=1e-12)
    metric.reset()
    assert metric.compute()["videos"] == 0
    assert metric.compute()["average_jaccard"].isnan()


def test_torchmetrics_counts_videos_without_visible_points_and_leaves_them_out():
    arrays = example(videos=3)
    arrays[1][1] = True
    metric = metrics.TapVidMetric("first")
    metric.update(*arrays)
    figures = metric.compute()
    assert (figures["videos"], figures["videos_without_visible_points"]) == (2, 1)
    alone = metrics.tapvid(*(array[[0, 2]] for array in arrays), "first")
    for key in METRIC_NAMES:
        assert math.isclose(figures[key].item(), alone[key].mean(), abs_tol=1e-12)


def test_torchmetrics_counts_a_repeated_video_once():
    arrays = example(videos=3)
    metric = metrics.TapVidMetric("first")
    metric.update(*arrays, videos=["a", "b", "c"])
    once = metric.compute()["average_jaccard"].item()
    metric.update(*(array[:2] for array in arrays), videos=["a", "b"])
    assert metric.compute()["average_jaccard"].item() == once
    assert metric.compute()["videos"] == 3
    with pytest.raises(ValueError, match="names 1 videos, the arrays hold 3"):
        metric.update(*arrays, videos=["a"])
    assert metric.compute()["videos"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("videos", [1, 5])
def test_torchmetrics_gives_the_same_figures_on_several_processes(tmp_path, videos):
    arrays = example(4, videos=videos)
    data = tmp_path / "data.npz"
    names = ("query", "occluded", "tracks", "guessed_occluded", "guessed_tracks")
    np.savez(data, **dict(zip(names, arrays, strict=True)))
    result = tmp_path / "figures.json"
    arguments = [str(tmp_path / "rendezvous"), str(data), str(result)]
    running = [
        subprocess.Popen([sys.executable, str(PROCESS), str(rank), "2", *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    alone = metrics.TapVidMetric("first")
    alone.update(*arrays, videos=[f"video {video}" for video in range(videos)])
    assert json.loads(result.read_text()) == {key: value.item() for key, value in alone.compute().items()}
