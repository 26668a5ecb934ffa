"""heads="features" of 16-bit inputs: on tensor cores in parts, as exact as the mean over heads in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, ops
from corrdit.kernels.displacement import soft
from corrdit.kernels.shared import inputs
from corrdit.problem import PairProblem

GRID = TokenGrid(2, 4, 6)


@pytest.fixture
def sharp() -> tuple[Tensor, Tensor]:
    """Queries and keys `[1, 3, 48, 16]` of attention sharp enough that roundings of the logits show."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 1, 48, 16, generator=generator)
    drawn = [torch.randn(1, 3, 48, 16, generator=generator) for _ in range(2)]
    return 3 * (0.7 * drawn[0] + shared), 3 * (0.7 * drawn[1] + shared.roll(3, 2))


def displacement(q: Tensor, k: Tensor, backend: str) -> tuple[Tensor, ...]:
    """The displacement by means over heads of different weights, and its gradients."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    options: dict[str, Any] = {"heads": "features", "head_weights": (0.5, 0.2, 0.3), "frames": [(0, 1)]}
    found = ops.soft_displacement(q, k, GRID, backend=backend, **options)
    return found, *torch.autograd.grad(found.square().sum(), (q, k))


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-4), (torch.bfloat16, 1.5e-4)])
def test_means_in_parts_are_as_exact_as_weights_of_eleven_bits(monkeypatch, sharp, dtype, tolerance):
    q, k = (tensor.to(dtype) for tensor in sharp)
    seen = []

    def watched(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor, PairProblem]:
        taken = inputs.kernel_input(q, k, problem)
        seen.append((taken[0].dtype, taken[1].dtype, taken[0].shape[1]))
        return taken

    monkeypatch.setattr(soft, "kernel_input", watched)
    exact = displacement(q.double(), k.double(), "reference")
    found = displacement(q, k, "triton")
    assert seen == [(dtype, dtype, 3)]
    assert relative_error(found[0], exact[0]) <= tolerance
    for mine, theirs in zip(found[1:], exact[1:], strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, theirs) <= 3 * torch.finfo(dtype).eps

    def one_rounding(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return q.to(dtype), k.to(dtype)

    monkeypatch.setattr(inputs, "tensor_core_parts", one_rounding)
    assert relative_error(displacement(q, k, "triton")[0], exact[0]) > 4 * tolerance


@pytest.mark.parametrize("size", [2.3e4, 6e4])
def test_means_up_to_the_largest_number_are_read(size):
    grid, generator = TokenGrid(2, 3, 6), torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 36, 16, generator=generator) for _ in range(2))
    q = (q.clamp(-1, 1) * size).expand(1, 3, 36, 16).half()
    k = k.expand(1, 3, 36, 16).half()
    found, exact = (
        ops.soft_displacement(*given, grid, heads="features", scale=0.3 / size, backend=backend)
        for given, backend in (((q, k), "triton"), ((q.double(), k.double()), "reference"))
    )
    torch.testing.assert_close(found.double(), exact, atol=2e-3, rtol=0)


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("operation", ["match", "attention_mass"])
def test_other_operations_take_the_parts(sharp, operation):
    q, k = (tensor.to(torch.bfloat16) for tensor in sharp)
    arguments = ([0, 7, 23],) if operation == "attention_mass" else ()
    found, exact = (
        getattr(ops, operation)(*inputs, GRID, *arguments, heads="features", backend=backend)
        for inputs, backend in (((q, k), "triton"), ((q.double(), k.double()), "reference"))
    )
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-3, rtol=0)


def test_single_precision_keeps_one_head(sharp, problem_about):
    problem = problem_about(GRID, [(0, 1)], scale=1.0, heads="features", weights=torch.full((1,), 1 / 3).expand(3))
    q, _, taken = inputs.kernel_input(*sharp, problem)
    assert (taken.heads, q.dtype, q.shape[1]) == ("logits", torch.float32, 1)
