"""Readings and scores against numbers computed with DiffTrack's released code."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.analysis.counts import TrueTracks, attention_sums, match_counts, video_positions
from corrdit.analysis.point_readings import point_tokens, read_attention, read_features
from corrdit.analysis.protocols import AnalysisOptions, analysis_options
from corrdit.tracking.filtering import low_pass
from corrdit.tracking.tracks import interpolate_tracks


def normal(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


@pytest.mark.parametrize("case", [0, 1])
def test_published_protocol_gives_the_released_tracks(golden, case):
    numbers = golden("difftrack_match")
    heads, head_dim, frames, height, width, seed, stride = numbers[f"{case}_meta"].tolist()
    q, k = (normal(s, 1, heads, frames, height * width, head_dim).flatten(2, 3) for s in (seed, seed + 100))
    grid = TokenGrid(frames, height, width)
    points = torch.from_numpy(numbers[f"{case}_points"][0])
    settings = {"points": points, "stride": (stride, stride)}
    published = analysis_options("published", {})
    reading = read_attention(q, k, grid, None, options=published, **settings)
    expected = numbers[f"{case}_headdim_tracks"][0, 1:]
    assert reading.positions.shape == (1 + heads, *expected.shape)
    assert np.abs(reading.positions[0].numpy() - expected).max() / np.abs(expected).max() < 1e-5
    ours = read_attention(q, k, grid, None, options=replace(published, geometry="centers"), **settings)
    assert np.abs(ours.positions[0].numpy() - expected).max() > 1


def test_attention_and_confidence_scores_are_the_released_ones(golden):
    numbers = golden("attention_mass")
    heads, head_dim, frames, height, width, text, seed = numbers["meta"].tolist()
    q, k = (normal(s, heads, text + frames * height * width, head_dim)[None] for s in (seed, seed + 100))
    grid = TokenGrid(frames, height, width, text_tokens=text)
    rows, columns = np.divmod(numbers["positions"], width)
    points = torch.from_numpy(np.stack((columns * 16 + 8, rows * 16 + 8), -1)).float()
    reading = read_attention(q, k, grid, None, points=points, stride=(16, 16), options=AnalysisOptions())
    visible = torch.ones(frames, len(points), dtype=torch.bool)
    xy = points.expand(frames, -1, -1)
    truth = TrueTracks(xy, visible, tuple((frame,) for frame in range(frames)))
    sums = attention_sums(reading, truth)
    count = len(points)
    assert sums.attention_cases == count
    assert sums.confidence_cases == count * (frames - 1)
    for found, expected in (
        (sums.text[0] / count, numbers["text_sum"].mean()),
        (sums.own[0] / count, numbers["self_sum"].mean()),
        (sums.cross[0] / count, numbers["cross_sum"].mean()),
        (sums.confidence[0] / sums.confidence_cases, numbers["frame_peak"][:, 1:].mean()),
    ):
        assert abs(found - expected) < 1e-6
    hidden = replace(truth, visible=visible & (torch.arange(frames)[:, None] != 2))
    fewer = attention_sums(reading, hidden)
    kept = np.delete(numbers["frame_peak"], [0, 2], axis=1)
    assert abs(fewer.confidence[0] / fewer.confidence_cases - kept.mean()) < 1e-6


def test_released_tokens_are_transposed_and_clipped_by_the_wrong_side():
    grid = TokenGrid(2, 3, 6)
    points = torch.tensor([[10.0, 40.0], [90.0, 2.0]])  # (x, y), tokens of 16 pixels
    assert point_tokens(points, grid, (16, 16), "nearest").tolist() == [2 * 6 + 0, 0 * 6 + 5]
    # x / 16 = 0.6 -> row 1, y / 16 = 2.5 -> column 2; x / 16 = 5.6 -> 6, clipped by the height to row 2, column 0
    assert point_tokens(points, grid, (16, 16), "released").tolist() == [1 * 6 + 2, 2 * 6 + 0]


def test_feature_matching_is_the_plain_dot_product_or_the_cosine():
    grid = TokenGrid(3, 4, 5, text_tokens=2)
    features = torch.randn(1, grid.video_tokens, 12)
    points = (grid.coordinates() + 0.5) * 8
    settings = {"heads": 3, "points": points, "stride": (8, 8)}
    frames = features[0].unflatten(0, (3, 20))
    for similarity, vectors in (("dot", frames), ("cosine", torch.nn.functional.normalize(frames, dim=-1))):
        found = read_features(features, grid, options=AnalysisOptions(similarity=similarity), **settings)
        best = torch.einsum("pc,fqc->fpq", vectors[0], vectors[1:]).argmax(-1)
        torch.testing.assert_close(found[0], (grid.coordinates()[best] + 0.5) * 8)


def test_latent_frames_become_video_frames_by_the_codec_or_evenly():
    groups = ((0,), (1, 2, 3, 4), (5, 6, 7, 8))
    xy = torch.zeros(9, 1, 2)
    truth = TrueTracks(xy, torch.ones(9, 1, dtype=torch.bool), groups)
    tracks = torch.tensor([0.0, 2.5, 6.5])[None, :, None, None].expand(1, 3, 1, 2)
    by_codec = video_positions(tracks, truth, "codec")[0, :, 0, 0]
    torch.testing.assert_close(by_codec, torch.tensor([0, 1, 2, 3, 4, 5, 6, 6.5, 6.5]))
    evenly = video_positions(tracks, truth, "released")
    torch.testing.assert_close(evenly, interpolate_tracks(tracks, 9))


def test_counts_by_hand():
    xy = torch.tensor([[[10.0, 10.0], [30.0, 10.0]], [[18.0, 10.0], [30.0, 10.0]], [[26.0, 10.0], [30.0, 10.0]]])
    visible = torch.tensor([[True, True], [True, True], [True, False]])
    truth = TrueTracks(xy, visible, ((0,), (1,), (2,)))
    guess = torch.tensor([[[18.0, 12.0], [30.0, 10.0]], [[26.0, 16.0], [30.0, 10.0]]])[None]
    settings = {"stride": (4, 4), "thresholds": (1.0, 2.0, 8.0)}
    counts = match_counts(guess, truth, options=AnalysisOptions(), **settings)
    assert counts.cases == 3
    # Off by 2, 6 and 0 pixels: a hit is nearer than the threshold.
    assert counts.hits.tolist() == [[1, 1, 3]]
    assert counts.moving_cases == 2
    assert counts.moving_hits.tolist() == [[0, 0, 2]]
    released = match_counts(guess, truth, options=AnalysisOptions(count_query_frame=True), **settings)
    assert (released.cases, released.hits.tolist()) == (5, [[3, 3, 5]])
    late = replace(truth, visible=torch.tensor([[True, False], [True, True], [True, False]]))
    assert match_counts(guess, late, options=AnalysisOptions(), **settings).cases == 2
    seen_later = AnalysisOptions(count_hidden_starts=True)
    assert match_counts(guess, late, options=seen_later, **settings).hits.tolist() == [[1, 1, 3]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"xy": torch.zeros(3, 2)}, r"xy \[frames, points, 2\]"),
        ({"visible": torch.zeros(3, 2, dtype=torch.bool)}, "no point is visible both"),
        ({"xy": torch.full((3, 2, 2), float("nan"))}, "NaN or infinite where a point is visible"),
        ({"frame_map": ((0,), (1,))}, "frame map names the frames"),
    ],
)
def test_truth_is_checked(change, message):
    given = {
        "xy": torch.zeros(3, 2, 2),
        "visible": torch.ones(3, 2, dtype=torch.bool),
        "frame_map": ((0,), (1,), (2,)),
    }
    with pytest.raises(ValueError, match=message):
        TrueTracks(**{**given, **change})


@pytest.mark.parametrize(
    "given, message",
    [
        ({"similarity": "l2"}, "similarity must be one of cosine, dot"),
        ({"thresholds": (0.0,)}, "thresholds must be positive"),
        ({"layers": ()}, "layers must be whole numbers"),
        ({"least_motion": float("nan")}, "least_motion"),
        ({"speed": 1}, "unknown analysis option 'speed'"),
    ],
)
def test_options_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        analysis_options("default", given)


def test_queries_that_are_nan_are_refused():
    grid = TokenGrid(2, 2, 2)
    q = torch.randn(1, 1, 8, 4)
    q[0, 0, 3, 1] = float("nan")
    with pytest.raises(ValueError, match="the queries hold 1 numbers that are NaN"):
        read_attention(
            q, q, grid, None, points=torch.zeros(1, 2), stride=(4, 4), options=AnalysisOptions(per_head=False)
        )


def test_low_pass_readings_follow_the_heads_and_match_filtered_queries_and_keys():
    grid = TokenGrid(3, 4, 6, text_tokens=5)
    q, k = normal(1, 1, 2, grid.tokens, 8), normal(2, 1, 2, grid.tokens, 8)
    mask = torch.ones(1, grid.tokens, dtype=torch.bool)
    mask[:, -3:] = False
    points = (grid.coordinates() + 0.5) * 8
    options = AnalysisOptions(low_pass=(0.7, 2.0))
    reading = read_attention(q, k, grid, mask, points=points, stride=(8, 8), options=options)
    assert reading.positions.shape == (1 + 2 + 2, 2, 24, 2)
    assert reading.text.shape == (3, 24)
    video = grid.video_slice
    for place, spread in ((3, 0.7), (4, 2.0)):
        smooth = [low_pass(part[:, :, video], grid.without_text(), spread) for part in (q, k)]
        found = ops.match(*smooth, grid.without_text(), key_mask=mask[:, video]).xy[0].flatten(1, 2)
        torch.testing.assert_close(reading.positions[place], (found + 0.5) * 8)
    with pytest.raises(ValueError, match="low_pass must be different standard deviations"):
        AnalysisOptions(low_pass=(1.0, 1.0))
