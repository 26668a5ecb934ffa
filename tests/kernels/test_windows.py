"""What a window costs: the pairs that the tiles visit, counted, beside those that it needs."""

from __future__ import annotations

import pytest

from corrdit.kernels.shared import configs, windows
from corrdit.kernels.shared.configs import Tiles


def test_needed_pairs_are_those_of_the_windows():
    for radius in (0, 2, 9):
        places = [(x, y) for y in range(3) for x in range(7)]
        near = [
            abs(x - other_x) <= radius and abs(y - other_y) <= radius for x, y in places for other_x, other_y in places
        ]
        assert windows.needed_pairs(3, 7, radius) == sum(near)


def test_a_window_over_the_whole_frame_visits_every_tile():
    # Two blocks of 4 x 4 queries for 3 x 7 tokens, each against 21 keys in two tiles of 16.
    assert windows.visited_pairs(3, 7, 9, Tiles(16, 16, 16, 1, 1)) == 2 * 16 * 32
    assert windows.block_count(16, 21, 3, 7, 9) == 2


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
    ((16, 16), (1.85, 1.44)), ((16, 32), (2.02, 1.49)), ((32, 16), (2.39, 1.69)), ((64, 64), (3.28, 2.08)),
    ((128, 128), (5.28, 2.70)),
])  # fmt: skip
def test_what_larger_tiles_would_visit(tiles, ratios):
    """The table of `benchmarks/NOTES.md`."""
    found = [
        windows.visited_pairs(30, 45, radius, Tiles(*tiles, 64, 4, 2)) / windows.needed_pairs(30, 45, radius)
        for radius in (4, 8)
    ]
    assert found == pytest.approx(ratios, abs=0.005)
