"""Tiny random pipelines and the operations the tests read them with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipeline() -> Callable[..., Any]:
    from corrdit.testing import tiny_pipeline

    return tiny_pipeline


@pytest.fixture
def generation() -> Callable[..., dict[str, Any]]:
    from corrdit.testing import tiny_generation

    return tiny_generation


@pytest.fixture
def scores() -> Callable[..., torch.Tensor]:
    """An operation: mean score of every pair of tokens, [B, N, N]."""

    def operation(q, k, grid, key_mask):
        return (q.float() @ k.float().transpose(-1, -2)).mean(dim=1)

    return operation


@pytest.fixture
def transformer_call(pipeline) -> Callable[..., tuple[torch.nn.Module, dict[str, Any]]]:
    """A tiny transformer and arguments for it by name."""
    from corrdit.integrations.diffusers.testing.subject import Subject

    def build(name: str = "cogvideox-rotary", seed: int = 0) -> tuple[torch.nn.Module, dict[str, Any]]:
        from corrdit.testing import tiny_backbone

        subject = Subject.random(tiny_backbone(name, seed=seed), frames=3, batch=2, seed=seed)
        return subject.transformer, subject.arguments()

    return build
