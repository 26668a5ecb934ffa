"""Soft displacement on kernels: values and gradients on pinned shapes, skipped tiles, determinism, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corrdit import TokenGrid, kernels
from corrdit.kernels.shared import tables

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ROW = TokenGrid(2, 1, 5)
RAGGED = TokenGrid(2, 5, 7)
SMALL = TokenGrid(2, 3, 6)
ONE_PAIR = ((1, 0),)

PER_HEAD: list[dict[str, Any]] = [
    {"dtype": SINGLE, "head_dim": 8, "grid": ROW},
    {"dtype": SINGLE, "head_dim": 10, "grid": RAGGED, "pairs": ONE_PAIR, "layout": "slices"},
    {"dtype": BRAIN, "head_dim": 96, "pairs": ONE_PAIR, "layout": "tokens first"},
    {"dtype": HALF, "head_dim": 128, "pairs": ONE_PAIR},
    {"dtype": BRAIN, "head_dim": 64, "pairs": ((0, 0), (0, 1)), "kept": 0.6},
    {"dtype": HALF, "head_dim": 16, "pairs": ONE_PAIR, "kept": 0.0},
    {"dtype": SINGLE, "head_dim": 16, "pairs": ONE_PAIR, "kept": 0.6, "batch": 2, "heads": 1},
    {"dtype": SINGLE, "head_dim": 16, "grid": RAGGED, "window": 1, "pairs": ONE_PAIR},
    {"dtype": BRAIN, "head_dim": 16, "window": 2, "moved": True, "batch": 2, "heads": 1, "pairs": ONE_PAIR},
    {"dtype": HALF, "head_dim": 12, "window": 0, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "head_dim": 16, "window": 1, "moved": True, "kept": 0.5, "pairs": ONE_PAIR, "heads": 1},
    {"dtype": SINGLE, "mode": "probabilities", "weights": (0.7, 0.3)},
    {"dtype": BRAIN, "mode": "probabilities", "heads": 3, "pairs": ONE_PAIR, "kept": 0.7},
    {"dtype": SINGLE, "mode": "logits", "heads": 1, "pairs": ((0, 1), (0, 1))},
    {"dtype": HALF, "head_dim": 32, "size": 6.0, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "head_dim": 16, "layout": "dims first", "grid": TokenGrid(3, 1, 17), "pairs": ((2, 0), (0, 2))},
]
FOLDED: list[dict[str, Any]] = [
    {"dtype": SINGLE, "head_dim": 8, "grid": ROW},
    {"dtype": SINGLE, "head_dim": 10, "grid": RAGGED, "pairs": ONE_PAIR, "layout": "slices"},
    {"dtype": BRAIN, "head_dim": 96, "heads": 3, "pairs": ONE_PAIR, "layout": "tokens first"},
    {"dtype": HALF, "head_dim": 40, "pairs": ((0, 0), (0, 1), (1, 1))},
    {"dtype": BRAIN, "head_dim": 16, "kept": 0.6, "batch": 2},
    {"dtype": HALF, "head_dim": 16, "kept": 0.0, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "head_dim": 16, "grid": RAGGED, "window": 1, "pairs": ((1, 0), (1, 1))},
    {"dtype": BRAIN, "head_dim": 16, "window": 2, "moved": True, "batch": 2},
    {"dtype": HALF, "head_dim": 12, "window": 0},
    {"dtype": SINGLE, "head_dim": 16, "window": 1, "moved": True, "kept": 0.5},
    {"dtype": SINGLE, "heads": 3, "weights": (0.2, 0.0, 0.8), "pairs": ((0, 0), (0, 1), (1, 0), (1, 1))},
    {"dtype": BRAIN, "weights": (0.6, 0.4), "pairs": ONE_PAIR},
    {"dtype": HALF, "weights": (0.9, 0.1), "pairs": ONE_PAIR, "kept": 0.8},
    {"dtype": SINGLE, "head_dim": 256, "pairs": ONE_PAIR},
    {"dtype": SINGLE, "grid": TokenGrid(3, 1, 17), "layout": "dims first", "pairs": ((2, 0), (0, 2), (0, 2))},
]


@pytest.mark.parametrize("pinned", PER_HEAD)
def test_each_head_by_itself(check, case, pinned):
    check("soft_displacement", case(**pinned), gradients=True)


@pytest.mark.parametrize("pinned", FOLDED)
def test_averaged_logits(check, case, pinned):
    check("soft_displacement", case(mode="logits", **pinned), gradients=True)


# Frames of 35 tokens are a tile of keys and half of one, of 11 half a tile, of 21 one tile; 37 frames share few tiles
# of queries. Pairs in any order, also twice; parts that end inside frames.
@pytest.mark.parametrize(
    "pinned",
    [
        {"grid": TokenGrid(2, 5, 7)},
        {"grid": TokenGrid(37, 1, 2), "pairs": tuple((i, 2) for i in range(37)), "kept": 0.7},
        {"grid": TokenGrid(5, 1, 11), "pairs": ((4, 1), (0, 1), (1, 1), (0, 1), (3, 1), (2, 0), (3, 0))},
        {"grid": TokenGrid(3, 3, 7), "queries": (25, 60), "keys": (8, 60), "pairs": ((1, 0), (2, 0), (1, 2))},
        {"grid": TokenGrid(2, 3, 6), "batch": 2, "kept": 0.6},
    ],
    ids=str,
)
def test_tiles_of_averaged_logits_hold_rows_of_several_frames(check, case, pinned):
    from corrdit.kernels.shared.configs import Tiles, override

    with override(folded_forward=Tiles(32, 32, 16, 1, 1)):
        check("soft_displacement", case(dtype=SINGLE, mode="logits", head_dim=16, **pinned))


def test_runs_of_queries_that_follow_each_other():
    # Frames of 4 tokens, of which q holds the last 3 of frame 0, frame 1 and 2 of frame 2, and k frames 0 and 2.
    held, keys = [-1, 1, 4, 3, 0, 4, 7, 0, 2], [0, 0, 4, 4, 0, 0, 4, 0, 4]
    pairs = [0, 0, 2, 0, 1, 0, 0, 2, 1, 2, 2, 2]
    table = tables.frame_pairs(pairs, held, keys, 2, 2, torch.device("cpu"))
    assert table.query_runs[:, :4].tolist() == [[0, 3, 0, 1], [7, 2, 1, 2], [3, 4, 2, 3], [0, 9, 3, 6]]
    assert table.query_runs[:, 4:7].tolist() == [[0, 0, 4]] * 3 + [[4, 0, 4]]
    assert table.pairs[:, 7].tolist() == [0, 0, 0, 0, 3, 7]
    assert table.longest_run == 9


@pytest.mark.parametrize(("queries", "keys", "scores"), [(17550, 1350, 17664 * 1408), (100, 256, 128 * 256),
                                                         (128, 385, 128 * 512)])  # fmt: skip
def test_half_a_tile_does_for_the_last_keys(queries, keys, scores):
    from corrdit.kernels.displacement.folded import visited_scores
    from corrdit.kernels.shared.configs import Tiles

    assert visited_scores(queries, keys, Tiles(128, 256, 64, 8, 3)) == scores


@pytest.mark.parametrize("mode", ["logits", "none"])
def test_windows_skip_tiles(mode):
    from corrdit.kernels.displacement.folded import folded_forward
    from corrdit.kernels.displacement.soft_forward import soft_forward

    q = torch.randn(1, 1, 96, 16)
    table = tables.frame_pairs([0, 0], [0, 0, 96], [0, 0, 96], 12, 8, q.device)
    visited = torch.zeros(1, dtype=torch.int32)
    counts = {}
    for window in (-1, 1, 0):
        visited.zero_()
        if mode == "none":
            soft_forward(q, q, table, 1.0, None, None, window, visited)
        else:
            folded_forward(q, q, None, table, 1.0, None, None, window, visited)
        counts[window] = int(visited)
    # Blocks of 4 x 4 tokens: all keys are six tiles; the windows of a block reach 5 x 6 of them (5 x 5 in a corner), in
    # two by two tiles of 4 x 4; its own 16 are one.
    assert counts == {-1: 6 * 6, 1: 6 * 4, 0: 6 * 1}
    far = torch.zeros(1, 96, 2, dtype=torch.int32)
    visited.zero_()
    if mode == "none":
        soft_forward(q, q, table, 1.0, None, far, 0, visited)
    else:
        folded_forward(q, q, None, table, 1.0, None, far, 0, visited)
    assert int(visited) == 6


@pytest.mark.parametrize("mode", ["logits", "none"])
def test_gradients_are_the_same_from_run_to_run(case, mode, call):
    pinned = case(dtype=torch.bfloat16, mode=mode, pairs=((0, 0), (0, 1), (1, 0)))
    q, k = (pinned.tensor(seed).requires_grad_() for seed in range(2))
    options = {"heads": mode, "weights": pinned.head_weights(), "scale": 0.3, "temperature": 1.0}
    options.update(key_mask=None, window=None, center=None)
    first, second = (
        torch.autograd.grad(
            call(kernels, "soft_displacement", q, k, pinned.grid, list(pinned.pairs), **options).square().sum(), (q, k)
        )
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["logits", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_in_the_rows_it_belongs_to(case, mode, masked, call):
    pinned = case(mode=mode)
    q, k = (pinned.tensor(seed) for seed in range(2))
    q[0, 0, 4] = float("nan")
    mask = None
    if masked:
        mask = torch.ones(1, pinned.grid.tokens, dtype=torch.bool)
        mask[0, 20] = False
        k[0, :, 20] = float("nan")
    q, k = q.requires_grad_(), k.requires_grad_()
    found = call(
        kernels,
        "soft_displacement",
        q,
        k,
        pinned.grid,
        [(0, 1)],
        heads=mode,
        weights=pinned.head_weights(),
        scale=0.3,
        key_mask=mask,
    )
    rows = found.isnan().any(-1).flatten(-2)
    expected = torch.zeros_like(rows)
    expected[(0, 0, 0, 4) if mode == "none" else (0, 0, 4)] = True
    assert torch.equal(rows, expected)
    # A loss without the undefined row: its gradient reaches no other query.
    (dq,) = torch.autograd.grad(found.masked_fill(found.isnan(), 0.0).square().sum(), (q,))
    assert not dq[0, :, 5:].isnan().any()
    assert not dq[0, :, :4].isnan().any()


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_any_sign_of_the_scale(case, scale, call):
    from corrdit import reference

    pinned = case()
    q, k = (pinned.tensor(seed).requires_grad_() for seed in range(2))
    options = {"heads": "none", "weights": None, "scale": scale, "temperature": 1.0}
    options.update(key_mask=None, window=None, center=None)
    mine, theirs = (
        call(backend, "soft_displacement", q, k, pinned.grid, [(0, 1)], **options) for backend in (kernels, reference)
    )
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    for one, two in zip(
        torch.autograd.grad(mine.square().sum(), (q, k)),
        torch.autograd.grad(theirs.square().sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_workspace_of_any_size_gives_the_same_gradients(case, monkeypatch, call):
    from corrdit.kernels.displacement import folded_backward

    pinned = case(mode="logits", grid=RAGGED, pairs=((0, 0), (0, 1), (1, 0)))
    q, k = (pinned.tensor(seed).requires_grad_() for seed in range(2))
    gradients = []
    for size in (folded_backward.WORKSPACE_BYTES, 35 * 20 * 4):
        monkeypatch.setattr(folded_backward, "WORKSPACE_BYTES", size)
        found = call(kernels, "soft_displacement", q, k, pinned.grid, list(pinned.pairs), heads="logits", scale=0.3)
        gradients.append(torch.autograd.grad(found.square().sum(), (q, k)))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
