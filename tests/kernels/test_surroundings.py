"""Interpreted kernels in processes whose defaults somebody has changed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, ops
from corrdit.kernels.shared import tables

GRID = TokenGrid(2, 3, 4, text_tokens=2)


def results(inputs: list[Tensor]) -> list[Tensor]:
    q, k, v = inputs
    mask = (torch.arange(GRID.tokens, device="cpu") % 7 != 3).expand(1, -1)
    options = {"key_mask": mask, "backend": "triton"}
    found = [
        ops.soft_displacement(q, k, GRID, frames=[(0, 1)], **options),
        ops.hard_displacement(q, k, GRID, frames=[(0, 1)], heads="features", window=1, **options),
        *ops.match(q, k, GRID, heads="features", refine=1, **options),
        ops.cost_rows(q, k, GRID, [1, 3], heads="features", **options),
        *ops.attention_mass(q, k, GRID, [1, 3], heads="features", **options),
        ops.frame_local_attention(q, k, v, GRID, **options),
    ]
    if not torch.is_inference_mode_enabled():
        found += torch.autograd.grad(found[0].sum() + found[-1].square().sum(), inputs)
    return found


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("float64", "meta")), "inference mode", "deterministic"],
)
def test_kernels_give_the_same_bits(name):
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(1, 2, GRID.tokens, 16, generator=generator).requires_grad_() for _ in range(3)]
    wanted = results(inputs)
    for kept in (tables._frame_pairs, tables.token_segments):
        kept.cache_clear()
    with contextlib.ExitStack() as stack:
        if name == "float64":
            stack.callback(torch.set_default_dtype, torch.float32)
            torch.set_default_dtype(torch.float64)
        elif name == "meta":
            stack.enter_context(torch.device("meta"))
        elif name == "inference mode":
            stack.enter_context(torch.inference_mode())
        else:
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        found = results(inputs)
    for one, other in zip(found, wanted, strict=False):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one, other)
