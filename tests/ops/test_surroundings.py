"""What a process has changed before it calls an operation changes no bit of the result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, motion, ops

GRID = TokenGrid(3, 4, 5, text_tokens=2)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "streaming"])


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "cpu": lambda: default_device("cpu"),
    "meta": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
}


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 2, GRID.tokens, 8, generator=generator).to(dtype) for _ in range(3)]


def results(inputs: list[Tensor], center: Tensor, reference: Tensor, backend: str) -> list[Tensor]:
    """Every operation, with gradients where autograd is on; whole tensors and shards of keys."""
    inputs = [tensor.clone().requires_grad_(torch.is_grad_enabled()) for tensor in inputs]
    q, k, v = inputs
    mask = (torch.arange(GRID.tokens, device="cpu") % 7 != 3).expand(2, -1)
    found: list[Tensor] = []
    differentiable: list[Tensor] = []
    for heads in ("logits", "features", "probabilities", "none"):
        options = {"heads": heads, "backend": backend}
        differentiable.append(ops.soft_displacement(q, k, GRID, **options))
        differentiable.append(ops.soft_displacement(q, k, GRID, window=1, key_mask=mask, **options))
        found.append(ops.hard_displacement(q, k, GRID, window=1, key_mask=mask, **options))
        found.extend(ops.match(q, k, GRID, refine=1, key_mask=mask, **options))
        found.append(ops.cost_rows(q, k, GRID, [1, 3], **options))
        found.extend(ops.attention_mass(q, k, GRID, [1, 3], **options))
    weights = {"heads": "logits", "head_weights": [1, 3], "backend": backend}
    differentiable.append(ops.soft_displacement(q, k, GRID, frames=[(0, 1)], window=1, center=center, **weights))
    shards = [(0, 25), (25, GRID.video_tokens)]
    parts = [
        ops.frame_local_attention(
            q, *(t[:, :, GRID.text_tokens :][:, :, start:stop] for t in (k, v)), GRID, keys=(start, stop),
            return_lse=True, backend=backend,
        )
        for start, stop in shards
    ]  # fmt: skip
    differentiable.append(ops.merge(*zip(*parts, strict=True)))
    for renormalize in (True, False):
        options = {"renormalize": renormalize, "key_mask": mask, "backend": backend}
        differentiable.append(ops.frame_local_attention(q, k, v, GRID, **options))
    differentiable.append(motion.attention_flow_loss(q, k, GRID, reference, backend=backend))
    if torch.is_grad_enabled():
        # Plain PyTorch leaves the precision of its backward pass to the caller.
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and backend != "reference"):
            total = sum(result.float().square().sum() for result in differentiable)
            found.extend(torch.autograd.grad(total, inputs))
    return [*found, *(result.detach() for result in differentiable)]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_operations_give_the_same_bits(name, dtype, backend):
    inputs = tensors(dtype)
    center = torch.zeros(2, 1, GRID.height, GRID.width, 2)
    reference = ops.hard_displacement(*inputs[:2], GRID)
    with torch.set_grad_enabled(name != "inference mode"):
        wanted = results(inputs, center, reference, backend)
        with SURROUNDINGS[name]():
            found = results(inputs, center, reference, backend)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert torch.equal(one, other)
