"""Hard displacement, matching, cost rows and attention mass on kernels: pinned shapes, ties, NaN, skipped tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corrdit import TokenGrid, kernels
from corrdit.kernels.matching import best_product, correspondence
from corrdit.kernels.shared import tables

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
RAGGED = TokenGrid(2, 5, 7)
TEXT_FIRST, TEXT_LAST = TokenGrid(2, 3, 6, text_tokens=19), TokenGrid(2, 3, 6, text_tokens=5, text_first=False)
ONE_PAIR = ((1, 0),)

HARD: list[dict[str, Any]] = [
    {"dtype": SINGLE, "head_dim": 8, "grid": TokenGrid(2, 1, 5)},
    {"dtype": BRAIN, "head_dim": 10, "grid": RAGGED, "pairs": ONE_PAIR, "layout": "slices"},
    {"dtype": HALF, "head_dim": 96, "pairs": ONE_PAIR, "kept": 0.5},
    {"dtype": SINGLE, "window": 1, "batch": 2},
    {"dtype": SINGLE, "window": 2, "moved": True, "kept": 0.4},
    {"dtype": SINGLE, "kept": 0.0, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "kept": 0.5, "pairs": ONE_PAIR, "batch": 2, "heads": 1},
    {"dtype": SINGLE, "mode": "logits", "heads": 3, "layout": "tokens first"},
    {"dtype": BRAIN, "mode": "logits", "pairs": ONE_PAIR, "kept": 0.7},
    {"dtype": SINGLE, "mode": "logits", "weights": (0.3, 0.7), "window": 1},
    {"dtype": SINGLE, "mode": "probabilities", "heads": 3, "batch": 2, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "mode": "probabilities", "weights": (0.1, 0.9), "kept": 0.6},
    {"dtype": SINGLE, "mode": "probabilities", "window": 1, "moved": True, "kept": 0.6},
    {"dtype": BRAIN, "mode": "probabilities", "grid": RAGGED, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "mode": "probabilities", "kept": 0.0, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "grid": TokenGrid(3, 1, 17), "pairs": ((2, 0), (0, 2)), "layout": "dims first"},
]
MATCH: list[dict[str, Any]] = [
    {"dtype": SINGLE, "mode": "probabilities", "options": {"refine": 1}},
    {"dtype": SINGLE, "mode": "probabilities", "options": {"refine": 1, "bidirectional": False}, "kept": 0.5},
    {"dtype": BRAIN, "mode": "probabilities", "weights": (0.2, 0.8), "layout": "tokens first"},
    {"dtype": HALF, "mode": "probabilities", "grid": RAGGED, "head_dim": 10, "layout": "slices"},
    {"dtype": SINGLE, "mode": "probabilities", "kept": 0.0, "options": {"refine": 1}},
    {"dtype": SINGLE, "mode": "logits", "options": {"refine": 2}, "kept": 0.7, "grid": TokenGrid(2, 2, 4)},
    {"dtype": SINGLE, "mode": "logits", "heads": 3, "weights": (0.5, 0.0, 0.5), "options": {"bidirectional": False}},
    {"dtype": BRAIN, "mode": "logits", "head_dim": 40},
    {"dtype": SINGLE, "mode": "none", "batch": 2, "options": {"refine": 1}, "grid": TokenGrid(2, 2, 4)},
    {"dtype": SINGLE, "mode": "none", "kept": 0.6, "options": {"bidirectional": False}},
    {"dtype": SINGLE, "kept": 0.6, "batch": 2, "heads": 1, "options": {"refine": 1}, "grid": TokenGrid(2, 2, 4)},
    {"dtype": HALF, "mode": "none", "head_dim": 128, "layout": "dims first"},
    {"dtype": SINGLE, "mode": "probabilities", "heads": 1, "head_dim": 256, "grid": TokenGrid(2, 1, 5)},
    {"dtype": BRAIN, "mode": "none", "options": {"refine": 1}, "kept": 0.6, "grid": TokenGrid(2, 2, 4)},
    {"dtype": HALF, "mode": "logits", "options": {"refine": 1}, "weights": (0.3, 0.7), "grid": TokenGrid(2, 2, 4)},
    {"dtype": SINGLE, "mode": "probabilities", "options": {"refine": 9}, "heads": 1, "grid": TokenGrid(2, 1, 5)},
]
ROWS: list[dict[str, Any]] = [
    {"dtype": SINGLE, "mode": "probabilities"},
    {"dtype": BRAIN, "mode": "probabilities", "weights": (0.4, 0.6), "kept": 0.5, "options": {"bidirectional": False}},
    {"dtype": SINGLE, "mode": "logits", "kept": 0.6, "weights": (0.4, 0.6)},
    {"dtype": HALF, "mode": "logits", "options": {"bidirectional": False}},
    {"dtype": SINGLE, "mode": "none", "batch": 2, "kept": 0.6},
    {"dtype": BRAIN, "mode": "none", "head_dim": 10, "layout": "slices"},
    {"dtype": SINGLE, "mode": "probabilities", "kept": 0.0},
    {"dtype": SINGLE, "mode": "probabilities", "head_dim": 8, "grid": TokenGrid(3, 2, 9), "options": {"source": 2}},
    {"dtype": BRAIN, "mode": "logits", "heads": 3, "layout": "tokens first", "grid": TokenGrid(1, 2, 9),
     "options": {"source": 0}},
    {"dtype": HALF, "mode": "none", "head_dim": 96, "heads": 1, "options": {"bidirectional": False}},
    {"dtype": SINGLE, "mode": "none", "kept": 0.0, "heads": 1},
    {"dtype": SINGLE, "mode": "logits", "batch": 2, "layout": "dims first", "options": {"bidirectional": False}},
    {"dtype": BRAIN, "mode": "probabilities", "head_dim": 128, "heads": 1, "kept": 0.7},
    {"dtype": HALF, "mode": "probabilities", "weights": (0.0, 1.0), "options": {"source": 0}},
    {"dtype": SINGLE, "mode": "probabilities", "heads": 1, "head_dim": 256, "options": {"bidirectional": False}},
]  # fmt: skip
MASS: list[dict[str, Any]] = [
    {"dtype": SINGLE, "mode": "probabilities", "grid": TEXT_FIRST},
    {"dtype": SINGLE, "mode": "none", "grid": TEXT_LAST, "kept": 0.5},
    {"dtype": BRAIN, "mode": "probabilities", "grid": TEXT_LAST, "weights": (0.3, 0.7), "kept": 0.7},
    {"dtype": SINGLE, "mode": "logits", "grid": TEXT_LAST, "weights": (0.3, 0.7)},
    {"dtype": HALF, "mode": "logits", "heads": 3, "grid": TEXT_FIRST, "layout": "tokens first"},
    {"dtype": SINGLE, "mode": "probabilities", "batch": 2, "head_dim": 10, "layout": "slices"},
    {"dtype": SINGLE, "mode": "none", "grid": TEXT_FIRST, "kept": 0.0},
    {"dtype": SINGLE, "mode": "probabilities", "head_dim": 8, "grid": TokenGrid(3, 2, 9), "options": {"source": 2}},
    {"dtype": BRAIN, "mode": "none", "head_dim": 96, "heads": 1, "grid": TEXT_LAST, "layout": "tokens first"},
    {"dtype": HALF, "mode": "none", "head_dim": 128, "heads": 1, "kept": 0.6},
    {"dtype": SINGLE, "mode": "logits", "kept": 0.4, "heads": 3, "grid": TEXT_FIRST},
    {"dtype": SINGLE, "kept": 0.4, "batch": 2, "heads": 1, "grid": TEXT_FIRST},
    {"dtype": BRAIN, "mode": "logits", "batch": 2, "grid": TEXT_LAST, "layout": "dims first"},
    {"dtype": HALF, "mode": "probabilities", "weights": (1.0, 0.0), "grid": TEXT_FIRST, "size": 6.0},
    {"dtype": SINGLE, "mode": "logits", "kept": 0.0, "grid": TEXT_LAST},
    {"dtype": SINGLE, "mode": "probabilities", "heads": 1, "head_dim": 256, "grid": TEXT_LAST},
]


@pytest.mark.parametrize("pinned", HARD)
def test_hard_displacement(check, case, pinned):
    check("hard_displacement", case(**pinned))


@pytest.mark.parametrize("pinned", MATCH)
def test_matching(check, case, pinned):
    options = {"bidirectional": True, "refine": 0, **pinned.get("options", {})}
    check("match", case(**{**pinned, "options": {**options, "positional": [1, [0, 1]]}}))


@pytest.mark.parametrize("pinned", ROWS)
def test_cost_rows(check, case, pinned):
    options = {"bidirectional": True, "source": 1, **pinned.get("options", {})}
    tokens = torch.tensor([17, 0, 3, 3])
    check("cost_rows", case(**{**pinned, "options": {**options, "positional": [tokens]}}))


@pytest.mark.parametrize("pinned", MASS)
def test_attention_mass(check, case, pinned):
    tokens = torch.arange(18).roll(5)
    options = {"source": 1, **pinned.get("options", {}), "positional": [tokens]}
    check("attention_mass", case(**{**pinned, "options": options}))


def hard(call: Any, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, mode: str) -> torch.Tensor:
    return call(kernels, "hard_displacement", q, k, grid, [(0, 0)], heads=mode, scale=1.0)


@pytest.mark.parametrize("mode", ["none", "logits", "probabilities"])
def test_ties_go_to_the_lowest_index_and_nan_wins(mode, call):
    grid = TokenGrid(1, 1, 40)
    q = torch.ones(1, 1, 40, 8)
    k = torch.zeros(1, 1, 40, 8)
    own = torch.arange(40)
    assert torch.equal(hard(call, q, k, grid, mode)[..., 0].flatten(), -own)
    k[0, 0, 7] = k[0, 0, 21] = k[0, 0, 39] = 2.0
    assert torch.equal(hard(call, q, k, grid, mode)[..., 0].flatten(), 7 - own)
    if mode != "probabilities":
        k[0, 0, 25] = k[0, 0, 36] = float("nan")
        assert torch.equal(hard(call, q, k, grid, mode)[..., 0].flatten(), 25 - own)
    if mode != "probabilities":
        assert torch.equal(hard(call, q, torch.full_like(k, float("-inf")), grid, mode)[..., 0].flatten(), -own)
    q[0, 0, 3] = float("nan")
    found = hard(call, q, k, grid, mode)[..., 0].flatten()
    assert found[3] == -3
    assert found[4] == (25 if mode != "probabilities" else 7) - 4


def test_nan_of_a_match_stays_in_its_row(case, call):
    pinned = case(mode="probabilities")
    q, k = (pinned.tensor(seed) for seed in range(2))
    clean = call(
        kernels, "match", q, k, pinned.grid, 0, [1], heads="probabilities", scale=0.3, bidirectional=False, refine=0
    )
    q[0, 0, 4] = float("nan")
    xy, score = call(
        kernels, "match", q, k, pinned.grid, 0, [1], heads="probabilities", scale=0.3, bidirectional=False, refine=0
    )
    assert score.flatten()[4].isnan()
    others = torch.arange(18) != 4
    assert torch.equal(score.flatten()[others], clean[1].flatten()[others])
    assert torch.equal(xy.flatten(0, -2)[others], clean[0].flatten(0, -2)[others])


def test_windows_skip_tiles_of_the_argmax():
    q = torch.randn(1, 1, 96, 16)
    arrangement = correspondence.arrange(q, "none", None, 1.0).heads
    table = tables.frame_pairs([0, 0], [0, 0, 96], [0, 0, 96], 12, 8, q.device)
    counts = {}
    for window in (-1, 1, 0):
        visited = torch.zeros(1, dtype=torch.int32)
        best_product.best_product(q, q, table, arrangement, None, window=window, visited=visited)
        counts[window] = int(visited)
    # Six blocks of 4 x 4 queries, and key tiles of 4 x 4: two by two cover the keys round a block.
    assert counts == {-1: 6 * 6, 1: 6 * 4, 0: 6 * 1}
