"""What the gradients launch and which products they take, on tensors without memory at a published model's shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corrdit import TokenGrid, ops
from corrdit.kernels.displacement import folded_backward
from corrdit.kernels.displacement.soft import compute_soft_displacement_backward
from corrdit.kernels.shared import launch
from corrdit.kernels.shared.tables import whole_frames

HEADS, HEAD_DIM, FRAMES, HEIGHT, WIDTH = 48, 64, 13, 30, 45
FRAME = HEIGHT * WIDTH


class Products(TorchDispatchMode):
    """Every matrix product of PyTorch's: its name, and the strides of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]], torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul"):
            factors = [a.stride() for a in arguments if isinstance(a, Tensor)][-2:]
            self.seen.append((name, factors, result.dtype))
        return result


def folded_gradient(wanted: list[bool], masked: bool = False) -> tuple[Products, Counter[str]]:
    """The gradient of averaged logits of CogVideoX-5B, every pair of its frames."""
    q = torch.empty(1, HEADS, FRAMES * FRAME, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    pairs = [frame for i in range(FRAMES) for j in range(FRAMES) for frame in (i, j)]
    statistics = torch.empty(1, 1, FRAMES**2 * FRAME, device="meta")
    places = whole_frames(FRAMES, FRAME)
    moved = torch.empty(*statistics.shape, 2, device="meta")
    mask = torch.empty(1, q.shape[2], dtype=torch.bool, device="meta") if masked else None
    launches: Counter[str] = Counter()
    with launch.compile_only("9.0", lambda kernel, *_: launches.update([kernel.__name__])), Products() as products:
        compute_soft_displacement_backward(
            moved, None, q, q, None, mask, None, moved, statistics, pairs, places, places, HEIGHT, WIDTH, True, 0.1, -1,
            "ieee", wanted,
        )  # fmt: skip
    return products, launches


@pytest.mark.parametrize("masked", [False, True])
def test_averaged_logits_take_two_plain_products_a_chunk(masked):
    products, launches = folded_gradient([True, True], masked)
    chunks = launches["folded_gradient_kernel"]
    # 32 MiB hold a whole frame of queries against eight key frames of 13: seven and six.
    assert chunks == 2 * FRAMES
    assert Counter(name for name, _, _ in products.seen) == {"addmm": 2 * chunks}
    for _, factors, dtype in products.seen:
        assert dtype == torch.float32
        for stride in factors:
            assert min(stride) == 1
            assert max(stride) % folded_backward.ALIGNMENT == 0


@pytest.mark.parametrize("wanted", [[True, False], [False, True]])
def test_averaged_logits_take_one_product_for_one_gradient(wanted):
    products, launches = folded_gradient(wanted)
    assert len(products.seen) == launches["folded_gradient_kernel"]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("operation", ["none", "logits", "frame_local_attention"])
def test_a_gradient_nobody_asked_for_is_not_computed(monkeypatch, wanted, operation):
    grid = TokenGrid(2, 2, 3)
    launched: list[str] = []
    started = launch.launch

    def watched(kernel: Any, *arguments: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        started(kernel, *arguments, **options)

    for module in ("displacement.soft_backward", "displacement.folded_backward", "frame_local.backward"):
        monkeypatch.setattr(f"corrdit.kernels.{module}.launch", watched)
    q, k = (torch.randn(1, 2, grid.tokens, 8, requires_grad=asked) for asked in wanted)
    both = [tensor.detach().requires_grad_() for tensor in (q, k)]

    def found(q: Tensor, k: Tensor) -> Tensor:
        if operation == "frame_local_attention":
            return ops.frame_local_attention(q, k, k.detach(), grid, backend="triton").square().sum()
        return ops.soft_displacement(q, k, grid, heads=operation, backend="triton").square().sum()

    (mine,) = torch.autograd.grad(found(q, k), [tensor for tensor in (q, k) if tensor.requires_grad])
    one = list(launched)
    theirs = torch.autograd.grad(found(*both), both)[wanted.index(True)]
    torch.testing.assert_close(mine, theirs)
    other = "key" if wanted[0] else "query"
    assert not any(name.endswith(f"_{other}_kernel") for name in one)
    assert one


@pytest.mark.parametrize("layout", ["tokens first", "heads first", "odd"])
def test_heads_are_joined_without_a_copy_where_they_lie_so(layout):
    if layout == "tokens first":
        tensor = torch.randn(7, 4, 16).transpose(0, 1)
    elif layout == "odd":
        tensor = torch.randn(4, 16, 7).transpose(1, 2)
    else:
        tensor = torch.randn(4, 7, 16)
    joined = folded_backward.joined_heads(tensor)
    assert torch.equal(joined, tensor.transpose(0, 1).flatten(1))
    assert joined.stride(0) % folded_backward.ALIGNMENT == 0
    assert (joined.data_ptr() == tensor.data_ptr()) == (layout == "tokens first")
