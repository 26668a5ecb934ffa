"""The registration with torch: opcheck, compiled callers, one derivative only; refusals and imports."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from corrdit import TokenGrid, kernels, ops, problem
from corrdit.benchmark import kernel_check
from corrdit.benchmark.kernel_cases import Case
from corrdit.kernels.requirements import unfit_machine
from corrdit.kernels.shared import configs, launch
from corrdit.kernels.shared.tables import whole_frames

GRID = TokenGrid(2, 1, 4)
HELD = (whole_frames(2, 4),) * 2
STRETCHES = [0, 0, 0, 4, 4, 8]


def operator(name: str) -> Any:
    return getattr(torch.ops.corrdit, name).default


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]


@pytest.mark.parametrize("folded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_opcheck_of_soft_displacement(inputs, folded):
    q, k = (t.requires_grad_() for t in inputs[:2])
    weights = torch.tensor([0.3, 0.7]) if folded else None
    torch.library.opcheck(
        operator("soft_displacement"), (q, k, weights, None, None, [0, 1], *HELD, 1, 4, folded, 0.5, -1, "ieee")
    )


@pytest.mark.slow
def test_opcheck_of_frame_local_attention(inputs):
    q, k, v = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(
        operator("frame_local_attention"), (q, k, v, None, STRETCHES, STRETCHES, 0, 0.5, False, "ieee")
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("hard_displacement", (None, None, None, [0, 1], *HELD, 1, 4, "none", 0.5, -1, "ieee")),
        pytest.param(
            "match", (None, None, [0, 1], *HELD, 1, 4, "probabilities", 0.5, True, 1, "ieee"), marks=pytest.mark.slow
        ),
        pytest.param(
            "cost_rows",
            (torch.tensor([1, 3]), None, None, 0, *HELD, 1, 4, "probabilities", 0.5, True, "ieee"),
            marks=pytest.mark.slow,
        ),
        ("attention_mass", (torch.tensor([1, 3]), None, None, 0, [0, 0, 0, 4, 4, 4], "none", 0.5, "ieee")),
    ],
)
def test_opcheck_of_measures(inputs, name, arguments):
    torch.library.opcheck(operator(name), (*inputs[:2], *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["soft_displacement", "match", "frame_local_attention"])
def test_what_the_check_compiles_on_a_gpu_is_one_graph(monkeypatch, operation):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: whole(function, backend="eager", fullgraph=True))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    case = Case(operation, "compiled", TokenGrid(2, 2, 3, text_tokens=2), torch.float32, 16)
    finding = kernel_check.compare(case, torch.device("cpu"), lambda inputs: kernel_check._compiled(case, inputs))
    assert finding.wrong is None


def test_a_compiled_caller_is_one_graph(inputs, call):
    q, k, v = (t.requires_grad_() for t in inputs)

    def caller(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        moved = call(kernels, "soft_displacement", q * 2, k, GRID, [(0, 1)], heads="logits", scale=0.3)
        seen = call(kernels, "frame_local_attention", q, k, v, GRID, scale=0.3, renormalize=True, span=0)
        return moved.square().sum() + seen.sin().sum()

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager")
    for one, two in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(caller(q, k, v), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_a_compiled_caller_on_a_gpu_is_one_graph(inputs, monkeypatch):
    """What a GPU is asked stands outside of the graph: dynamo cannot follow it to the file system."""
    asked = []

    def on_a_gpu(device: str, interpreted: bool) -> str | None:
        asked.append(unfit_machine("cuda:0", interpreted))
        return asked[-1]

    monkeypatch.setattr(launch, "unfit_machine", on_a_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    q, k, v = inputs
    for caller in (
        lambda q, k, v: ops.soft_displacement(q, k, GRID, backend="triton"),
        lambda q, k, v: ops.match(q, k, GRID, backend="triton").xy,
        lambda q, k, v: ops.frame_local_attention(q, k, v, GRID, backend="triton"),
    ):
        asked.clear()
        found = torch.compile(caller, fullgraph=True, backend="eager")(q, k, v)
        assert asked
        assert set(asked) == {None}
        torch.testing.assert_close(found, caller(q, k, v))


def test_a_compiled_caller_of_the_operations_is_one_graph(inputs):
    q, k, v = (t.requires_grad_() for t in inputs)
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 5] = False

    def caller(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor, center: torch.Tensor
    ) -> list[torch.Tensor]:
        moved = ops.soft_displacement(
            q * 2, k, GRID, head_weights=weights, window=1, center=center, frames=[(0, 1)], backend="triton"
        )
        seen = ops.frame_local_attention(q, k, v, GRID, key_mask=mask, backend="triton")
        measures = [
            ops.hard_displacement(q, k, GRID, heads="features", frames=0, backend="triton"),
            *ops.match(q, k, GRID, head_weights=[0.2, 0.8], refine=1, backend="triton"),
            ops.cost_rows(q, k, GRID, [1, 3], backend="triton"),
            *ops.attention_mass(q, k, GRID, torch.tensor([2]), heads="none", backend="triton"),
        ]
        return [moved.square().sum() + seen.sin().sum(), *measures]

    compiled = torch.compile(caller, fullgraph=True, backend="eager")
    rest = (torch.tensor([3.0, 1.0]), torch.ones(1, 1, 1, 4, 2))
    found, expected = compiled(q, k, v, *rest), caller(q, k, v, *rest)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)
    for one, two in zip(
        torch.autograd.grad(found[0], (q, k, v)), torch.autograd.grad(expected[0], (q, k, v)), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_autocast_does_not_lower_the_precision(inputs):
    q, k, v = (t.requires_grad_() for t in inputs)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            moved = [
                ops.soft_displacement(q, k, GRID, heads=heads, frames=[(0, 1)], backend="triton")
                for heads in ("features", "probabilities")
            ]
            averaged = ops.soft_displacement(q, k, GRID, frames=[(0, 1)], backend="triton")
            found = ops.match(q, k, GRID, heads="features", refine=1, backend="triton")
            seen = ops.frame_local_attention(q, k, v, GRID, backend="triton")
            gradients = torch.autograd.grad(averaged.square().sum() + seen.square().sum(), (q, k, v))
        results.append([*moved, averaged, *found, seen, *gradients])
    for plain, under_autocast in zip(*results, strict=True):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("operation", ["soft", "local"])
def test_a_second_derivative_is_refused(inputs, operation, call):
    q, k, v = (t.requires_grad_() for t in inputs)
    if operation == "soft":
        found = call(kernels, "soft_displacement", q, k, GRID, [(0, 1)], heads="none", scale=0.3)
    else:
        found = call(kernels, "frame_local_attention", q, k, v, GRID, scale=0.3, renormalize=True, span=0)
    (dq,) = torch.autograd.grad(found.square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_float64_and_head_dims_out_of_range_are_refused(inputs, call):
    options = {"scale": 0.3, "key_mask": None, "renormalize": True, "span": 0}
    with pytest.raises(ValueError, match="float64"):
        call(kernels, "frame_local_attention", *(t.double() for t in inputs), GRID, **options)
    with pytest.raises(ValueError, match="head_dim 8 to 256, got 4"):
        call(kernels, "frame_local_attention", *(t[..., :4] for t in inputs), GRID, **options)
    with pytest.raises(ValueError, match="float64"):
        ops.match(inputs[0].double(), inputs[1].double(), GRID, backend="triton")


def test_frames_too_wide_for_exact_coordinates_are_refused():
    q = torch.zeros(1, 1, 2049, 8)
    with pytest.raises(ValueError, match="2048 x 2048"):
        ops.soft_displacement(q, q, TokenGrid(1, 1, 2049), heads="none", backend="triton")


def test_devices_that_are_no_good_are_named(monkeypatch):
    class Elsewhere:
        device = torch.device("mps")

    with pytest.raises(RuntimeError, match="got mps"):
        launch.check_device(Elsewhere())
    Elsewhere.device = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(RuntimeError, match="AMD"):
        launch.check_device(Elsewhere())


@pytest.mark.parametrize(
    ("capability", "table"),
    [((8, 0), "8.0"), ((8, 6), "8.9"), ((8, 9), "8.9"), ((9, 0), "9.0"), ((10, 0), "10.0"), ((12, 0), "8.9")],
)
def test_other_devices_take_the_nearest_table(capability, table):
    assert configs.table_of(capability) == table


def test_old_devices_are_refused():
    with pytest.raises(RuntimeError, match=r"8\.0 or later"):
        configs.table_of((7, 5))


def test_overridden_tiles_are_checked_and_put_back():
    before = configs.tiles("row_statistics", "9.0", 64, 2)
    with pytest.raises(ValueError, match="no kernel is called"), configs.override(nothing=before):
        pass
    with pytest.raises(ValueError, match="powers of two"), configs.override(row_statistics=before._replace(rows=48)):
        pass
    with configs.override(row_statistics=before._replace(rows=32)):
        assert configs.tiles("row_statistics", "9.0", 64, 2).rows == 32
    assert configs.tiles("row_statistics", "9.0", 64, 2).rows != 32


def test_precision_of_float32_products_is_asked_for(inputs):
    with pytest.raises(ValueError, match="ieee, tf32"), kernels.float32_precision("fast"):
        pass
    with kernels.float32_precision("tf32"):
        assert problem.product_precision() == "tf32"
    assert problem.product_precision() == "ieee"


def test_importing_the_package_imports_no_triton():
    code = "import sys, corrdit.kernels; assert not {'triton', 'torch'} & set(sys.modules), 'imported'"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


def test_importing_every_kernel_asks_cuda_nothing():
    code = """
import torch
def refuse(*arguments, **options):
    raise AssertionError("CUDA was asked for something")
for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties",
             "_lazy_init", "init"):
    setattr(torch.cuda, name, refuse)
from corrdit import kernels, ops
for name in kernels.__all__:
    getattr(kernels, name)
assert not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


def test_every_operation_is_offered():
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))
    with pytest.raises(AttributeError, match="nothing"):
        kernels.nothing  # noqa: B018
