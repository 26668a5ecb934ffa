"""Products of float32: exact unless tf32 is asked for by name, and then every one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, kernels, ops
from corrdit.problem import product_precision

pytestmark = pytest.mark.usefixtures("large_tiles")
GRID = TokenGrid(2, 2, 4, text_tokens=2)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "single heads": lambda q: ops.soft_displacement(q, q, GRID, heads="none", frames=0, backend="triton"),
    "averaged logits": lambda q: ops.soft_displacement(q, q, GRID, frames=0, backend="triton"),
    "averaged features": lambda q: ops.soft_displacement(q, q, GRID, heads="features", frames=0, backend="triton"),
    "hard": lambda q: ops.hard_displacement(q, q, GRID, frames=0, backend="triton"),
    "match": lambda q: ops.match(q, q, GRID, backend="triton").xy,
    "cost rows": lambda q: ops.cost_rows(q, q, GRID, [3], backend="triton"),
    "attention mass": lambda q: ops.attention_mass(q, q, GRID, [3], backend="triton").frames,
    "frame-local attention": lambda q: ops.frame_local_attention(q, q, q, GRID, backend="triton"),
}


@pytest.fixture
def precisions(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The precision of every `tl.dot` that runs."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: set[str] = set()
    create_dot = InterpreterBuilder.create_dot

    def watched(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, *rest: Any) -> Any:
        seen.add(precision.name.lower())
        return create_dot(self, a, b, accumulator, precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", watched)
    return seen


@pytest.fixture
def torch_takes_tf32() -> Iterator[None]:
    """torch's own switch for its matrix products is on: no request for less exact kernels."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("torch_takes_tf32")
@pytest.mark.parametrize("name", CALLS)
def test_tf32_reaches_every_product_and_only_by_request(precisions, name):
    q = torch.randn(1, 2, GRID.tokens, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run() -> list[Tensor]:
        found = CALLS[name](q)
        if not found.requires_grad:
            return [found]
        return [found, *torch.autograd.grad(found.square().sum(), (q,))]

    exact = run()
    assert precisions == {"ieee"}
    precisions.clear()
    with kernels.float32_precision("tf32"):
        rounded = run()
    assert precisions == {"tf32"}
    for one, two in zip(exact, rounded, strict=True):
        # The interpreter multiplies in float32 either way; a device keeps ten bits.
        torch.testing.assert_close(one, two, atol=0, rtol=2**-10)
    precisions.clear()
    run()
    assert precisions == {"ieee"}, "tf32 outlived its request"


def test_a_scope_belongs_to_its_thread_and_scopes_may_overlap():
    entered, left = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with kernels.float32_precision("tf32"):
            entered.set()
            assert left.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert entered.wait(60)
    assert product_precision() == "ieee"
    first, second = kernels.float32_precision("tf32"), kernels.float32_precision("ieee")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert product_precision() == "ieee"
    second.__exit__(None, None, None)
    assert product_precision() == "ieee"
    left.set()
    thread.join()


def test_a_compiled_caller_follows_the_scope(precisions):
    q = torch.randn(1, 2, GRID.tokens, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(CALLS["single heads"], fullgraph=True, backend="eager")
    for precision in ("ieee", "tf32", "ieee"):
        precisions.clear()
        with kernels.float32_precision(precision):
            compiled(q)
        assert precisions == {precision}
