"""Kernels on a part of the tokens, with fewer key heads, and with the log-sum-exp: forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corrdit import TokenGrid, ops

GRID = TokenGrid(3, 3, 7)
# Ends inside frames: more than a tile of keys in the middle frame, few in the others; the last frame of q has none.
PART = {"grid": GRID, "heads": 4, "key_heads": 2, "queries": (25, 40), "keys": (8, 60), "pairs": ((1, 0), (1, 2))}
WHOLE = {**PART, "queries": None, "keys": (8, 41), "pairs": ((0, 1), (2, 0), (2, 2))}
LOCAL = {"mode": None, "grid": GRID, "heads": 2, "key_heads": 1, "queries": (15, 50), "keys": (8, 60)}
SOFT: list[dict[str, Any]] = [
    {**PART, "with_lse": True},
    {**PART, "kept": 0.6, "dtype": torch.bfloat16},
    {**PART, "window": 1, "with_lse": True},
    {**PART, "mode": "logits", "weights": (1.0, 4.0, 2.0, 3.0), "with_lse": True},
    {**PART, "mode": "logits", "window": 1, "kept": 0.7},
    {**WHOLE, "mode": "logits"},
    {**WHOLE, "mode": "probabilities", "weights": (1.0, 4.0, 2.0, 3.0)},
    {**WHOLE, "mode": "features", "kept": 0.7},
    {"window": 1, "undefined_key": True, "grid": TokenGrid(2, 3, 6)},
    {"window": 1, "undefined_key": True, "mode": "logits"},
]


@pytest.mark.parametrize(
    "pinned", SOFT[:2] + [pytest.param(case, marks=pytest.mark.slow) for case in SOFT[2:]], ids=str
)
def test_soft_displacement(check, case, pinned):
    check("soft_displacement", case(**pinned), gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "logits", "probabilities", "features"])
@pytest.mark.parametrize("more", [{}, {"window": 1}, {"kept": 0.6}], ids=str)
def test_hard_displacement(check, case, mode, more):
    check("hard_displacement", case(**PART, mode=mode, **more))


@pytest.mark.parametrize("renormalize", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kept", [1.0, pytest.param(0.6, marks=pytest.mark.slow)])
def test_frame_local_attention(check, case, renormalize, kept):
    options = {"renormalize": renormalize, "span": 1}
    check("frame_local_attention", case(**LOCAL, kept=kept, with_lse=True, options=options), gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["none", "logits", "probabilities", "features"])
def test_measures(heads):
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, count, GRID.tokens, 8, generator=generator) for count in (4, 2))
    part, shard = q[:, :, 25:40], k[:, :, 8:60]
    calls = [
        lambda **how: ops.match(q, shard, GRID, keys=(8, 60), source=1, refine=1, **how),
        lambda **how: ops.match(part, k, GRID, queries=(25, 40), source=1, bidirectional=False, **how),
        lambda **how: [ops.cost_rows(q, shard, GRID, [3, 20], keys=(8, 60), source=2, **how)],
        lambda **how: [ops.cost_rows(part, shard, GRID, [5, 12], queries=(25, 40), keys=(8, 60), source=1,
                                     bidirectional=False, **how)],
        lambda **how: ops.attention_mass(part, shard, GRID, [5, 12], queries=(25, 40), keys=(8, 60), source=1, **how),
    ]  # fmt: skip
    for call in calls:
        found, exact = call(heads=heads, backend="triton"), call(heads=heads, backend="reference")
        for mine, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["none", "logits"])
def test_merged_shards_are_the_whole_displacement(heads):
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(1, 2, GRID.tokens, 8, generator=generator, requires_grad=True) for _ in range(2))

    def merged(backend: str) -> torch.Tensor:
        shards = [(0, 10), (10, 50), (50, 63)]
        found = [
            ops.soft_displacement(
                q,
                k[:, :, start:stop],
                GRID,
                heads=heads,
                frames=1,
                keys=(start, stop),
                return_lse=True,
                backend=backend,
            )
            for start, stop in shards
        ]
        return ops.merge(*zip(*found, strict=True))

    exact = ops.soft_displacement(q, k, GRID, heads=heads, frames=1, backend="reference")
    found = merged("triton")
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)
    weights = torch.randn(exact.shape, generator=generator)
    for one, two in zip(
        torch.autograd.grad((found * weights).sum(), (q, k)),
        torch.autograd.grad((exact * weights).sum(), (q, k)),
        strict=True,
    ):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


def test_frames_in_any_order_are_the_rows_of_the_whole():
    grid = TokenGrid(3, 2, 5, text_tokens=2)
    q, k = (torch.randn(1, 1, grid.tokens, 8, generator=torch.Generator().manual_seed(s)) for s in range(2))
    chosen = torch.cat([q[:, :, grid.text_slice], *(q[:, :, grid.frame_slice(frame)] for frame in (2, 0))], 2)
    found = ops.soft_displacement(chosen, k, grid, heads="none", query_frames=[2, 0], backend="triton")
    exact = ops.soft_displacement(q, k, grid, heads="none", backend="reference")[:, :, [2, 0]]
    torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)
