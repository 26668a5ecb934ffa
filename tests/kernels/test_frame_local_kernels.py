"""Frame-local attention on kernels: both variants with gradients on pinned shapes, determinism, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corrdit import TokenGrid, kernels, ops

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TEXT_FIRST, TEXT_LAST = TokenGrid(2, 2, 5, text_tokens=18), TokenGrid(3, 1, 6, text_tokens=3, text_first=False)
NO_TEXT = TokenGrid(2, 1, 17)

PINNED: list[dict[str, Any]] = [
    {"dtype": SINGLE, "grid": TEXT_FIRST, "heads": 1},
    {"dtype": SINGLE, "grid": TEXT_FIRST, "heads": 1, "options": {"renormalize": False}},
    {"dtype": BRAIN, "grid": TEXT_LAST, "head_dim": 64, "heads": 1},
    {"dtype": BRAIN, "grid": TEXT_LAST, "head_dim": 64, "heads": 1, "options": {"renormalize": False}},
    {"dtype": HALF, "grid": NO_TEXT, "head_dim": 10, "layout": "slices", "heads": 1},
    {"dtype": HALF, "grid": NO_TEXT, "head_dim": 10, "heads": 1, "options": {"renormalize": False}},
    {"dtype": SINGLE, "grid": TEXT_LAST, "kept": 0.6, "layout": "tokens first"},
    {"dtype": SINGLE, "grid": TEXT_LAST, "kept": 0.6, "options": {"renormalize": False}, "heads": 1, "batch": 2},
    {"dtype": SINGLE, "grid": TEXT_LAST, "options": {"span": 1}, "heads": 1},
    {"dtype": BRAIN, "grid": TEXT_LAST, "options": {"span": 1, "renormalize": False}, "heads": 1},
    {"dtype": SINGLE, "grid": TEXT_LAST, "options": {"span": 7, "renormalize": False}, "heads": 1},
    {"dtype": SINGLE, "grid": NO_TEXT, "kept": 0.0, "heads": 1},
    {"dtype": SINGLE, "grid": NO_TEXT, "kept": 0.0, "heads": 1, "options": {"renormalize": False}},
    {"dtype": BRAIN, "grid": TEXT_LAST, "head_dim": 96, "layout": "dims first", "heads": 1},
    {"dtype": SINGLE, "grid": TokenGrid(1, 1, 3, text_tokens=2), "head_dim": 256, "heads": 1},
]


@pytest.mark.parametrize("pinned", PINNED)
def test_values_and_gradients(check, case, pinned):
    options = {"renormalize": True, "span": 0, **pinned.get("options", {})}
    check("frame_local_attention", case(**{**pinned, "mode": None, "options": options}), gradients=True)


def test_gradients_are_the_same_from_run_to_run(case, call):
    pinned = case(dtype=torch.bfloat16, mode=None, grid=TEXT_LAST)
    inputs = [pinned.tensor(seed).requires_grad_() for seed in range(3)]
    options = {"scale": 0.3, "key_mask": None, "renormalize": True, "span": 0}
    first, second = (
        torch.autograd.grad(
            call(kernels, "frame_local_attention", *inputs, pinned.grid, **options).float().square().sum(), inputs
        )
        for _ in range(2)
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("size", [1e-6, 6e3])
@pytest.mark.parametrize("values", [4.0, 1e-4])
def test_half_gradients_of_any_size_are_not_lost(size, values):
    """As loss scaling gives them: dO.v passes the largest number of float16, or is below its smallest."""
    grid, generator = TokenGrid(2, 3, 8), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 48, 64, generator=generator) * size for size in (1.0, 0.05, values))
    inputs = [tensor.half().requires_grad_() for tensor in (q, k, v)]
    # Heads of their own range.
    sizes = torch.tensor([size, size * 64 if size < 1 else size / 64]).view(1, 2, 1, 1)
    upstream = (v.sign() * sizes).half()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        torch.autograd.grad(
            ops.frame_local_attention(*given, grid, backend=backend), given, upstream.to(given[0].dtype)
        )
        for given, backend in ((inputs, "triton"), (exact, "reference"))
    )
    for mine, theirs in zip(found, expected, strict=True):
        smallest = 2.0**-24  # of float16
        assert mine.isfinite().all()
        errors, largest = (tensor.abs().amax((0, 2, 3)) for tensor in (mine.double() - theirs, theirs))
        assert (errors <= 3e-3 * largest + smallest).all()


@pytest.mark.parametrize("level", [0.0, 1e-44, 1.0])
def test_half_gradients_of_a_log_sum_exp_alone(level):
    grid, generator = TokenGrid(2, 2, 3), torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 1, 12, 16, generator=generator).half().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = (
        torch.autograd.grad(
            (lse := ops.frame_local_attention(*given, grid, backend=backend, return_lse=True)[1]),
            given[:2],
            torch.full_like(lse, level),
        )
        for given, backend in ((inputs, "triton"), (exact, "reference"))
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=3e-3 * float(theirs.abs().max()) + 1e-30, rtol=0)


def test_nan_stays_where_it_is_seen(case, call):
    pinned = case(mode=None, grid=NO_TEXT)
    q, k, v = (pinned.tensor(seed) for seed in range(3))
    mask = torch.ones(1, 34, dtype=torch.bool)
    mask[0, 30] = False
    q[0, 0, 4] = k[0, 1, 30] = v[0, 1, 30] = float("nan")
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    found = call(kernels, "frame_local_attention", *inputs, NO_TEXT, scale=0.3, key_mask=mask, renormalize=True, span=0)
    expected = torch.zeros(1, 2, 34, dtype=torch.bool)
    expected[0, 0, 4] = True
    assert torch.equal(found.isnan().any(-1), expected)
    (dq,) = torch.autograd.grad(found.masked_fill(found.isnan(), 0.0).sum(), inputs[:1])
    assert torch.equal(dq.isnan().any(-1) & ~expected, torch.zeros_like(expected))
