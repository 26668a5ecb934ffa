"""Changes to a pipeline and its transformers that last as long as a block."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def frozen(transformer: torch.nn.Module) -> Iterator[None]:
    """Weights without gradients inside the block."""
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextlib.contextmanager
def forward_through(
    transformer: torch.nn.Module,
    steer: Callable[[torch.nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """Calls of the transformer go through `steer(transformer, its own forward, args, kwargs)`."""
    had = transformer.__dict__.get("forward")
    own = transformer.forward

    @functools.wraps(own)
    def steered(*args: Any, **kwargs: Any) -> Any:
        return steer(transformer, own, args, kwargs)

    transformer.forward = steered
    try:
        yield
    finally:
        if had is None:
            del transformer.__dict__["forward"]
        else:
            transformer.forward = had
