"""Offsets past 2**31 elements: the kernels walk strides in int64."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, ops

pytestmark = [
    pytest.mark.usefixtures("large_tiles"),
    pytest.mark.skipif(sys.platform != "linux", reason="reserves addresses as Linux does"),
]
GRID = TokenGrid(2, 3, 3)
HEADS, HEAD_DIM = 2, 8
# Each takes the last element of one axis past 2**31 elements, that of the tokens within the first frame already.
FAR = {
    "heads": (2**31 + 64, 8, 1),
    "tokens": (8, 2**28, 1),
    "dims": (16 * 18, 16, 2**29),
}


def far_apart(near: Tensor, strides: tuple[int, int, int]) -> Tensor:
    """The same values with these strides of the last three axes, in addresses of which only their pages are memory."""
    reach = sum((size - 1) * stride for size, stride in zip(near.shape[1:], strides, strict=True)) + 1
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0)
    try:
        addresses = mmap.mmap(
            -1, reach * near.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
        )
    except OSError as error:
        pytest.skip(f"the system grants no {reach * near.element_size() / 2**30:.0f} GiB of addresses: {error}")
    memory = torch.frombuffer(addresses, dtype=near.dtype)
    far = memory.as_strided(near.shape, (reach, *strides))
    far.copy_(near)
    return far


@pytest.mark.parametrize("axis", ["heads", "tokens", pytest.param("dims", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "operation", ["soft_displacement", "folded", "match", "attention_mass", "frame_local_attention"]
)
def test_far_elements_are_read(operation, axis):
    generator = torch.Generator().manual_seed(0)
    near = [torch.randn(1, HEADS, GRID.tokens, HEAD_DIM, generator=generator).half() for _ in range(3)]
    strides = FAR[axis]
    assert max((size - 1) * stride for size, stride in zip(near[0].shape[1:], strides, strict=True)) > 2**31
    far = [far_apart(near[0], strides), far_apart(near[1], strides), near[2]]
    for mine, theirs in zip(run(operation, far), run(operation, near), strict=True):
        assert torch.equal(mine, theirs)


def run(operation: str, inputs: list[Tensor]) -> list[Tensor]:
    """Results and gradients on the kernels."""
    options: dict[str, Any] = {"backend": "triton"}
    if operation == "frame_local_attention":
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        found = ops.frame_local_attention(*leaves, GRID, **options)
        return [found, *torch.autograd.grad(found.float().square().sum(), leaves)]
    q, k, _ = inputs
    if operation == "match":
        return list(ops.match(q, k, GRID, refine=1, **options))
    if operation == "attention_mass":
        return list(ops.attention_mass(q, k, GRID, [0, 8], **options))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    heads = "logits" if operation == "folded" else "none"
    found = ops.soft_displacement(q, k, GRID, heads=heads, frames=[(0, 1)], **options)
    return [found, *torch.autograd.grad(found.square().sum(), (q, k))]
