"""What a window costs: the pairs that the tiles visit beside those that it needs, and that each is there once."""

from __future__ import annotations

import pytest
import torch

from corrdit.kernels.displacement import soft_forward
from corrdit.kernels.shared import configs, tables, windows
from corrdit.kernels.shared.configs import Tiles


def test_needed_pairs_are_those_of_the_windows():
    for radius in (0, 2, 9):
        places = [(x, y) for y in range(3) for x in range(7)]
        near = [
            abs(x - other_x) <= radius and abs(y - other_y) <= radius for x, y in places for other_x, other_y in places
        ]
        assert windows.needed_pairs(3, 7, radius) == sum(near)


def test_a_window_over_the_whole_frame_visits_every_tile():
    # Two blocks of 4 x 4 queries for 3 x 7 tokens, each against 21 keys in two tiles of 4 x 4.
    assert windows.visited_pairs(3, 7, 9, Tiles(16, 16, 16, 1, 1)) == 2 * 16 * 32
    assert windows.block_count(16, 21, 3, 7, 9) == 2


@pytest.mark.xfail(strict=True, reason="64 x 64 tiles visit more, in fewer instructions for a needed pair: NOTES.md")
@pytest.mark.parametrize("radius", [4, 8])
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
@pytest.mark.parametrize("kernel", ["soft_forward_window", "soft_backward_query_window", "soft_backward_key_window"])
def test_windows_of_single_heads_visit_at_most_twice_what_they_need(monkeypatch, kernel, architecture, radius):
    monkeypatch.setattr(configs, "_overrides", {})
    tiles = configs.tiles(kernel, architecture, 64, 2)
    if kernel == "soft_backward_key_window":  # blocks of keys, with the queries that see them
        tiles = tiles._replace(rows=tiles.columns, columns=tiles.rows)
    assert windows.visited_pairs(30, 45, radius, tiles) <= 2 * windows.needed_pairs(30, 45, radius)


@pytest.mark.parametrize(("tiles", "ratios"), [
    ((16, 16), (1.99, 1.55)), ((32, 32), (2.81, 1.84)), ((64, 16), (3.28, 2.16)), ((64, 32), (3.57, 2.16)),
    ((64, 64), (4.09, 2.16)), ((128, 128), (8.17, 3.24)),
])  # fmt: skip
def test_what_tiles_of_a_window_visit(tiles, ratios):
    """The table of `benchmarks/NOTES.md`."""
    found = [
        windows.visited_pairs(30, 45, radius, Tiles(*tiles, 64, 4, 2)) / windows.needed_pairs(30, 45, radius)
        for radius in (4, 8)
    ]
    assert found == pytest.approx(ratios, abs=0.005)


@pytest.mark.parametrize(("radius", "center"), [(0, None), (1, None), (3, None), (20, None), (2, "given")])
@pytest.mark.parametrize("frame", [(9, 6), (1, 17), (5, 3)])
def test_tiles_of_a_window_cover_it_once_inside_the_frame(frame, radius, center):
    """The kernels' own arithmetic, run on tensors: each key of each window is in one tile, and none is in two."""
    visited = torch.zeros(1, dtype=torch.int32)
    height, width = frame
    q = torch.ones(1, 1, height * width, 16)
    table = tables.frame_pairs([0, 0], [0, 0, height * width], [0, 0, height * width], height, width, q.device)
    centers = None
    if center is not None:
        centers = torch.stack((torch.arange(height * width) % 2, torch.arange(height * width) % 3 % height), -1)
        centers = centers.clamp(max=width - 1).to(torch.int32)[None]
    _, levels = soft_forward.soft_forward(q, q, table, 1.0, None, centers, radius, visited)
    # All keys alike: the log-sum-exp counts them.
    x, y = (torch.arange(height * width) % width, torch.arange(height * width) // width)
    middle_x, middle_y = (x, y) if centers is None else centers[0].unbind(-1)
    near = ((middle_x[:, None] - x).abs() <= radius) & ((middle_y[:, None] - y).abs() <= radius)
    torch.testing.assert_close((levels.flatten() - 16.0).exp2(), near.sum(1).float())
    if centers is None:
        tiles = configs.tiles("soft_forward_window", configs.INTERPRETER, 16, 4)
        assert int(visited) == windows.visited_pairs(height, width, radius, tiles) // (tiles.rows * tiles.columns)
