"""What "auto" takes, and why an explicit backend cannot run."""

from __future__ import annotations

import logging

import pytest
import torch

from corrdit.kernels import requirements
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
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
        backends.select_backend("triton", torch.zeros(1, 1, 4, head_dim))
