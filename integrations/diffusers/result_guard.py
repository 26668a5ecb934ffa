"""What an operation hands back: free of queries and keys, detached unless asked otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def released(result: object, q: torch.Tensor, k: torch.Tensor, keep_graph: bool) -> object:
    """The result with its tensors detached (unless `keep_graph`), none of which shares memory with q or k.

    Args:
        result: a tensor, or tensors in dicts, lists, tuples or dataclasses; anything else is passed on.
        q: the queries the operation was given.
        k: the keys it was given.
        keep_graph: leave tensors attached to the autograd graph.

    Raises:
        ValueError: a tensor or array of the result, also inside other objects, is q, k or a view of them, which would
            keep a whole layer in memory; or the result is a generator, which would do its work on them later.
    """
    sources = {_memory(q): "q", _memory(k): "k"}
    for value in _reachable(result, set()):
        if isinstance(value, types.GeneratorType):
            raise ValueError(
                "the operation returned a generator, which would hold q and k until it is used up; return tensors"
            )
        held = sources.get(_memory(value))
        if held is not None:
            raise ValueError(
                f"the operation returned {held} or a view of it, which would keep the whole layer in memory; "
                "return what it computes, or a copy (.clone()) of the part you need"
            )
    return _handed_over(result, keep_graph)


def _reachable(value: object, seen: set[int]) -> Iterator[Any]:
    """The tensors, arrays and generators in a result, depth first; models and code are not looked into."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (torch.Tensor, np.ndarray, types.GeneratorType)):
        yield value
        return
    if isinstance(value, Mapping):
        children = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        children = list(value)
    elif isinstance(value, (type, types.ModuleType, types.FunctionType, torch.nn.Module)):
        children = []
    else:
        children = list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from _reachable(child, seen)


def _handed_over(result: Any, keep_graph: bool) -> Any:
    """Containers anew, their tensors detached unless `keep_graph`."""
    if isinstance(result, torch.Tensor):
        return result if keep_graph else result.detach()
    if isinstance(result, Mapping):
        return {name: _handed_over(value, keep_graph) for name, value in result.items()}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return type(result)(*(_handed_over(value, keep_graph) for value in result))
    if isinstance(result, (list, tuple)):
        return type(result)(_handed_over(value, keep_graph) for value in result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.init}
        return dataclasses.replace(result, **{name: _handed_over(v, keep_graph) for name, v in fields.items()})
    return result


@contextlib.contextmanager
def unchanged(q: torch.Tensor, k: torch.Tensor, name: str) -> Iterator[None]:
    """Raises ValueError if q or k were written to inside the block (tensors of inference mode keep no count)."""
    watched = [(label, tensor) for label, tensor in (("q", q), ("k", k)) if not tensor.is_inference()]
    versions = [tensor._version for _, tensor in watched]
    yield
    for (label, tensor), version in zip(watched, versions, strict=True):
        if tensor._version != version:
            raise ValueError(
                f"{name} wrote to {label} in place, which would change the model's output; work on {label}.clone()"
            )


@contextlib.contextmanager
def saved_tensors_kept_apart() -> Iterator[None]:
    """Inside, autograd keeps what it saves by itself.

    A checkpointed block counts the tensors saved in its forward and expects the same ones when it is run again; an
    operation inside it does not run again.
    """
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        yield


def _pack(tensor: torch.Tensor) -> torch.Tensor:
    # Keeping the tensor itself would make a reference cycle where it is the output of the node that saves it.
    return tensor.detach()


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _memory(value: torch.Tensor | np.ndarray) -> int | None:
    """Where the memory of a tensor or array begins, as a whole, not of its view; None if it is empty."""
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):
            value = value.base
        # An array made by `tensor.numpy()` has that tensor as its base.
        if not isinstance(value.base, torch.Tensor):
            return value.ctypes.data if value.size else None
        value = value.base
    if value.layout == torch.sparse_coo:
        value = value._values()
    elif value.layout != torch.strided:
        value = value.values()
    storage = value.untyped_storage()
    # Fake and meta tensors have no memory, but storages of their own.
    return (storage.data_ptr() or int(storage._cdata)) if value.numel() else None
