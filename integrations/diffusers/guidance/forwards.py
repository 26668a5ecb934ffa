"""Replacing a module's forward for a while, so that the hooks round it still run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_ABSENT = object()
Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`replacement(original, args, kwargs)` gives the output of the module."""


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, replacement: Replacement) -> Iterator[None]:
    """Inside, the module computes `replacement(original, args, kwargs)`, uncompiled.

    Where diffusers' hooks (group offloading) wrap the forward, what they wrap is replaced, so that they still run.
    """
    registry = getattr(module, "_diffusers_hook", None)
    references = [] if registry is None else registry._fn_refs
    holder: Any = references[0] if references else module
    original = holder.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, args, kwargs)

    with _attribute(holder, "forward", forward), uncompiled(module):
        yield


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Inside, a module that was compiled in place runs as written."""
    if module._compiled_call_impl is None:
        yield
        return
    with _attribute(module, "_compiled_call_impl", None):
        yield


@contextlib.contextmanager
def _attribute(holder: Any, name: str, value: Any) -> Iterator[None]:
    own = holder.__dict__.get(name, _ABSENT)
    holder.__dict__[name] = value
    try:
        yield
    finally:
        if own is _ABSENT:
            del holder.__dict__[name]
        else:
            holder.__dict__[name] = own
