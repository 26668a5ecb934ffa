"""What "auto" takes, and why an explicit backend cannot run."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.cli import main
from corrdit.kernels import requirements
from corrdit.motion import attention_flow_loss
from corrdit.ops import backends


@pytest.fixture(autouse=True)
def forget_choices():
    backends._automatic.cache_clear()
    yield
    backends._automatic.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "head_dim", "reason"),
    [
        ((9, 0), None, torch.bfloat16, 64, None),
        ((7, 5), None, torch.float16, 64, "compute capability 8.0"),
        ((9, 4), "6.2", torch.float16, 64, "AMD"),
        ((9, 0), None, torch.float64, 64, "not float64"),
        ((9, 0), None, torch.bfloat16, 4, "head_dim 8 to 256, got 4"),
        ((9, 0), None, torch.bfloat16, 264, "head_dim 8 to 256, got 264"),
    ],
)
def test_auto_says_what_it_took_on_a_gpu(monkeypatch, caplog, capability, hip, dtype, head_dim, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.INFO, logger="corrdit"):
        unfit = requirements.unfit_tensor(dtype, head_dim)
        chosen = [backends._automatic("cuda", dtype, unfit) for _ in range(2)]
    assert chosen == (["triton"] * 2 if reason is None else ["streaming"] * 2)
    assert len(caplog.records) == 1
    assert (reason or "takes") in caplog.text


def test_auto_takes_streaming_on_the_cpu():
    assert backends._automatic("cpu", torch.float32, None) == "streaming"


@pytest.mark.parametrize("head_dim", [4, 264])
def test_triton_by_name_refuses_a_head_dim_it_does_not_take(monkeypatch, head_dim):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=rf"head_dim 8 to 256, got {head_dim}; use backend=\"streaming\""):
        ops.soft_displacement(q := torch.zeros(1, 1, 4, head_dim), q, TokenGrid(1, 2, 2), backend="triton")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "operation",
    [
        ops.soft_displacement,
        ops.hard_displacement,
        ops.match,
        functools.partial(ops.cost_rows, tokens=[0]),
        functools.partial(ops.attention_mass, tokens=[0]),
        lambda q, k, grid, **options: ops.frame_local_attention(q, k, k, grid, **options),
        lambda q, k, grid, **options: attention_flow_loss(q, k, grid, torch.ones(1, 2, 2, 2, 2, 2), **options),
    ],
)
def test_a_budget_that_a_backend_would_ignore_is_refused(operation, backend):
    q = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=f'memory_budget is for .*; backend="{backend}" would ignore it'):
        operation(q, q, TokenGrid(2, 2, 2), backend=backend, memory_budget=1 << 20)


def test_an_interpreter_that_fails_beside_a_newer_numpy_is_named(monkeypatch, capsys):
    reason = requirements.unfit_interpreter("3.6.0", "2.4.6")
    assert reason == (
        "the interpreter of triton 3.6.0 does not run with numpy 2.4.6; install numpy below 2.4, or triton 3.7 or newer"
    )
    for versions in (("3.6.0", "2.3.5"), ("3.7.1", "2.4.6"), ("3.10.0", "2.4.6"), (None, "2.4.6")):
        assert requirements.unfit_interpreter(*versions) is None
    monkeypatch.setattr(requirements, "_UNFIT_INTERPRETER", reason)
    assert requirements.unfit_machine("cpu", interpreted=True) == reason
    assert main(["kernels", "--check", "--device", "cpu"]) == 2
    assert reason in capsys.readouterr().err


def test_a_triton_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = f"triton cannot write its cache {tmp_path / 'file' / 'cache'}; set TRITON_CACHE_DIR to a folder that can"
    assert reason in requirements.unfit_machine("cuda", interpreted=False)
    assert main(["kernels"]) == 2
    assert reason in capsys.readouterr().err
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "new" / "cache"))
    assert requirements.unfit_machine("cuda", interpreted=False) is None
