"""Costs in the arithmetic of the released runs: every step in bfloat16, a second softmax, ties to the lowest index."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.analysis.point_readings import read_attention, read_features
from corrdit.analysis.protocols import analysis_options
from corrdit.geometry import sample_matches
from corrdit.tracking.options import TrackerOptions
from corrdit.tracking.released_costs import bfloat16_costs, bfloat16_matches, tied_best

GRID = TokenGrid(4, 6, 9, text_tokens=3)


def drawn(seed: int, factor: float, heads: int = 3) -> torch.Tensor:
    shape = (1, heads, GRID.tokens, 16)
    return factor * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def released_matches(q: torch.Tensor, k: torch.Tensor, divisor: float) -> torch.Tensor:
    """By hand, in the order of the released code: both softmaxes, mean over heads, half the sum, softmax, maximum."""
    q, k = (part[:, :, GRID.video_slice].bfloat16().unflatten(2, (GRID.frames, -1)) for part in (q, k))
    found = []
    for target in range(1, GRID.frames):
        forward = (q[:, :, 0] @ k[:, :, target].mT / divisor).softmax(-1).mean(1)
        backward = (q[:, :, target] @ k[:, :, 0].mT / divisor).softmax(-1).mean(1)
        again = ((forward + backward.mT) / 2).softmax(-1)
        best = [row.tolist().index(max(row.tolist())) for row in again[0]]  # the lowest of equal ones
        found.append(torch.tensor([(index % GRID.width, index // GRID.width) for index in best]))
    return torch.stack(found).unflatten(1, (GRID.height, GRID.width)).float()


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
def test_matches_are_those_of_the_released_arithmetic(factor):
    q, k = drawn(0, factor), drawn(1, factor)
    found = bfloat16_matches(q, k, GRID)
    assert torch.equal(found[0], released_matches(q, k, math.sqrt(16)))
    by_heads = bfloat16_matches(q, k, GRID, scale=3**-0.5)
    assert torch.equal(by_heads[0], released_matches(q, k, math.sqrt(3)))


def test_flat_costs_tie_and_the_lowest_index_wins_while_sharp_ones_are_as_without_rounding():
    q, k = drawn(0, 0.3), drawn(1, 0.3)
    flat, exact = bfloat16_matches(q, k, GRID), ops.match(q, k, GRID).xy
    differing = (flat != exact).any(-1).float().mean()
    assert differing > 0.5
    index = [xy[..., 1] * GRID.width + xy[..., 0] for xy in (flat, exact)]
    assert index[0].mean() < 0.5 * index[1].mean()
    one = drawn(0, 3.0)[:, :, : GRID.tokens_per_frame]
    sharp = torch.cat([one[:, :, :3], *(one.roll(7 * frame, 2) for frame in range(GRID.frames))], 2)
    assert torch.equal(bfloat16_matches(sharp, sharp, GRID), ops.match(sharp, sharp, GRID).xy)
    costs = torch.tensor([[0.1, 0.3, 0.3001, 0.3]])
    assert tied_best(costs).tolist() == [1]
    assert costs.argmax(-1).tolist() == [2]


def test_masked_keys_are_not_matched():
    q, k = drawn(0, 1.0), drawn(1, 1.0)
    mask = torch.ones(1, GRID.tokens, dtype=torch.bool)
    gone = GRID.frame_slice(2)
    mask[:, gone.start : gone.start + 50] = False
    costs = bfloat16_costs(q, k, GRID, source=0, target=2, key_mask=mask, bidirectional=False)
    assert costs.dtype == torch.bfloat16
    assert not costs[..., :50].any()
    assert torch.allclose(costs.float().sum(-1), torch.ones(1, 54), atol=0.02)


def test_the_analysis_reads_them():
    q, k = drawn(0, 0.5), drawn(1, 0.5)
    points = (GRID.coordinates() + 0.3) * 16
    options = analysis_options("published", {"rounding": "bfloat16", "low_pass": (1.0,)})
    settings = {"points": points, "stride": (16, 16)}
    reading = read_attention(q, k, GRID, None, options=options, **settings)
    exact = read_attention(q, k, GRID, None, options=analysis_options("published", {"low_pass": (1.0,)}), **settings)
    read = {"stride": (16, 16), "geometry": "released"}
    expected = sample_matches(bfloat16_matches(q, k, GRID), points, **read)[0]
    assert torch.equal(reading.positions[0], expected)
    head = sample_matches(bfloat16_matches(q[:, 1:2], k[:, 1:2], GRID), points, **read)[0]
    assert torch.equal(reading.positions[2], head)
    assert torch.equal(reading.positions[4], exact.positions[4])
    assert torch.equal(reading.frame_peak, exact.frame_peak)
    features = drawn(2, 0.1, heads=1)[0, :, GRID.video_slice].repeat(1, 1, 3)
    found = read_features(features, GRID, heads=3, options=options, **settings)
    logits = features[0].bfloat16().unflatten(0, (GRID.frames, -1))
    best = [(logits[0] @ logits[frame].mT).softmax(-1).softmax(-1).argmax(-1) for frame in (1, 2, 3)]
    maps = GRID.coordinates()[torch.stack(best)].unflatten(1, (6, 9))
    assert torch.equal(found[0], sample_matches(maps, points, **read))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rounding": "float8"}, "rounding must be one of none, bfloat16"),
        ({"rounding": "bfloat16"}, 'is for geometry="released"'),
        ({"rounding": "bfloat16", "heads": "logits"}, "plain mean of all heads"),
        ({"rounding": "bfloat16", "head_weights": (1.0, 0.0)}, "plain mean of all heads"),
    ],
)
def test_what_does_not_go_together_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrackerOptions(**given)
