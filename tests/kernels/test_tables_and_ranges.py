"""Tables made once and outside of graphs, weights within the range of float16, the device that is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from corrdit import TokenGrid, ops
from corrdit.kernels import requirements
from corrdit.kernels.frame_local import layout
from corrdit.kernels.shared import tables

GRID = TokenGrid(2, 2, 4, text_tokens=3)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "soft": lambda q: ops.soft_displacement(q, q, GRID, backend="triton"),
    "hard": lambda q: ops.hard_displacement(q, q, GRID, heads="probabilities", backend="triton"),
    "match": lambda q: ops.match(q, q, GRID, backend="triton").score,
    "cost rows": lambda q: ops.cost_rows(q, q, GRID, [3], backend="triton"),
    "mass": lambda q: ops.attention_mass(q, q, GRID, [3], backend="triton").text,
    "local": lambda q: ops.frame_local_attention(q, q, q, GRID, backend="triton"),
}
LAUNCHED = {"soft": 1, "hard": 1, "match": 1, "cost rows": 1, "mass": 1, "local": 0}
MADE = (tables._frame_pairs, tables._coordinates, tables.token_segments, layout._local_table)


def made() -> list[int]:
    return [made_once.cache_info().misses for made_once in MADE]


@pytest.mark.parametrize("operation", CALLS)
def test_a_traced_caller_has_its_tables_before_its_graph_runs(operation):
    torch._dynamo.reset()
    for made_once in MADE:
        made_once.cache_clear()
    seen: list[list[int]] = []

    def before_running(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(made())
        return graph.forward

    q = torch.randn(1, 2, GRID.tokens, 8)
    found = torch.compile(CALLS[operation], backend=before_running, fullgraph=True)(q)
    assert len(seen) == 1
    assert sum(seen[0]) > 0
    assert made() == seen[0], "a table was made while the graph ran"
    torch.testing.assert_close(found, CALLS[operation](q))


class Counted(TorchDispatchMode):
    """Names of the operations that are launched: all but those that only look at memory another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not function.is_view and function.namespace == "aten":
            self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


# Beside the operator of the kernels: the one number that stands for equal weights of the heads.
@pytest.mark.parametrize("operation", CALLS)
def test_a_later_call_makes_no_table(operation):
    q = torch.randn(1, 2, GRID.tokens, 8)
    CALLS[operation](q)
    before = made()
    with Counted() as counted:
        CALLS[operation](q)
    assert made() == before
    launched = [name for name in counted.names if not name.startswith(("empty", "new_empty", "fill"))]
    assert len(launched) <= LAUNCHED[operation], launched


def test_a_capture_without_tables_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        tables.refuse_capture(torch.device("cuda"))
    tables.refuse_capture(torch.device("cpu"))


@pytest.mark.parametrize("operation", ["soft", "match", "mass"])
def test_one_head_of_many_stays_in_the_range_of_float16(operation):
    heads = 48
    q = torch.full((1, heads, GRID.tokens, 8), 1500.0) + torch.arange(GRID.tokens)[None, None, :, None]
    k = 1e-3 * torch.randn(q.shape, generator=torch.Generator(q.device).manual_seed(0))
    weights = [0.0] * (heads - 1) + [1.0]
    assert 1500 * heads > torch.finfo(torch.float16).max

    def found(backend: str, dtype: torch.dtype) -> Tensor:
        given = q.half().to(dtype), k.half().to(dtype), GRID
        options: dict[str, Any] = {"heads": "logits", "head_weights": weights, "backend": backend}
        if operation == "soft":
            return ops.soft_displacement(*given, frames=[(0, 1)], **options)
        if operation == "match":
            return ops.match(*given, **options).score
        return ops.attention_mass(*given, [3], **options).frames

    torch.testing.assert_close(
        found("triton", torch.float16).double(), found("reference", torch.float64), atol=3e-3, rtol=3e-3
    )


def test_the_capability_of_the_tensors_own_device_counts(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 5) if device == torch.device("cuda:1") else (9, 0)
    )
    assert requirements.unfit_machine("cuda:0", False) is None
    assert requirements.unfit_machine("cuda:1", False) == (
        "the kernels need compute capability 8.0 or later, cuda:1 has 7.5"
    )
