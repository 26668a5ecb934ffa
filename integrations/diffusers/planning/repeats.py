"""Forwards that repeat what was traced: of equal modules called with equal shapes without gradients, one runs.

A video transformer has dozens of equal blocks, a codec dozens of equal tiles and chunks. What such a forward takes
beyond what is there as it begins, its work and its results are known from the first of them; the others make their
results and count the same, operator by operator nothing else. Modules that are read, steered or keep something in
themselves run every time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from corrdit.integrations.diffusers.host.forwards import Arguments, Forward, replaced_forward
from corrdit.integrations.diffusers.planning.memory_trace import MemoryTrace, Taken
from corrdit.integrations.diffusers.planning.residence import Bringing

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device)
_LIBRARIES = ("torch", "diffusers", "transformers", "builtins", "functools")
"""Whose objects say by their type and entries what a module does with them."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_NOT_READ = ("forward", "layer_idx")
"""Attributes that make no two modules different; a forward is looked at by itself."""


Places = dict[int, tuple[int, torch.dtype]]
"""Of tensors among arguments by their storage: their number and type."""


class NotRepeatableError(Exception):
    """What a forward takes is not told by structures and shapes alone."""


@dataclass(frozen=True)
class _Result:
    """A tensor that a forward gave.

    Args:
        source: number of the argument whose storage it has, or of the storage among new ones.
        given: whether it has the storage of an argument.
        nbytes: of the storage.
        dtype, size, stride, offset: of the tensor.
    """

    source: int
    given: bool
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Known:
    """What a forward took and gave.

    Args:
        taken: memory and work.
        leaves: `_Result` or plain values of its output and of the lists among its arguments.
        spec: how these are arranged.
    """

    taken: Taken
    leaves: tuple[Any, ...]
    spec: TreeSpec


class Repeats:
    """What forwards took, by structure of the module and shapes of its arguments."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Known | None] = {}
        self._own: dict[int, object] = {}

    @contextlib.contextmanager
    def counted(self, parts: Iterable[nn.Module], trace: MemoryTrace) -> Iterator[None]:
        """Inside, forwards in these parts of a model that repeat are counted in the trace and not run."""
        with contextlib.ExitStack() as stack:
            for part in parts:
                for module in part.modules():
                    if module is not part and any(True for _ in module.children()):
                        through = functools.partial(self._forward, module, trace)
                        stack.enter_context(replaced_forward(module, through))
                        self._own[id(module)] = module.forward
            try:
                yield
            finally:
                self._own.clear()

    def _forward(
        self, module: nn.Module, trace: MemoryTrace, original: Forward, args: tuple[Any, ...], kwargs: Arguments
    ) -> Any:
        if torch.is_grad_enabled():
            return original(*args, **kwargs)
        given, spec = tree_flatten((args, kwargs))
        try:
            key = (self._structure(module, root=True), str(spec), *map(_signature, given), trace.present_kind)
        except NotRepeatableError:
            return original(*args, **kwargs)
        if key not in self._known:
            places = {value.untyped_storage()._cdata: (place, value.dtype) for place, value in enumerate(given)
                      if isinstance(value, Tensor)}  # fmt: skip
            # What a list held goes when the forward puts something else there.
            del given
            return self._first(key, module, trace, original, args, kwargs, places)
        known = self._known[key]
        if known is None:
            return original(*args, **kwargs)
        trace.repeat(known.taken)
        output, contents = _made(known, given)
        for own, content in zip(_lists((args, kwargs)), contents, strict=True):
            own[:] = content
        return output

    def _first(
        self,
        key: tuple[Any, ...],
        module: nn.Module,
        trace: MemoryTrace,
        original: Forward,
        args: tuple[Any, ...],
        kwargs: Arguments,
        places: Places,
    ) -> Any:
        """Run a forward and keep what it took."""
        before = _kept_in(module)
        with trace.taken() as taken:
            output = original(*args, **kwargs)
        self._known[key] = None
        if _kept_in(module) == before:
            with contextlib.suppress(NotRepeatableError):
                self._known[key] = _known_of(taken, output, _lists((args, kwargs)), places, trace)
        return output

    def _structure(self, module: nn.Module, *, root: bool = False) -> tuple[Any, ...]:
        """What decides, beside its arguments, what a module does.

        Raises:
            NotRepeatableError: a module that something looks into.
        """
        own = vars(module)
        hooks = []
        if not root:
            if own.get("forward") is not self._own.get(id(module)):
                raise NotRepeatableError
            hooks = [_hook(hook) for kind in ("_forward_pre_hooks", "_forward_hooks") for hook in own[kind].values()]
        tensors = [
            (name, _signature(tensor)) for kind in ("_parameters", "_buffers") for name, tensor in own[kind].items()
        ]
        attributes = [
            (name, _described(value))
            for name, value in own.items()
            if name not in _OF_EVERY_MODULE and name not in _NOT_READ
        ]
        children = [
            (name, None if child is None else self._structure(child)) for name, child in own["_modules"].items()
        ]
        return (type(module), tuple(hooks), tuple(tensors), tuple(attributes), tuple(children))


def _hook(hook: object) -> tuple[Any, ...]:
    bringing = getattr(hook, "__self__", None)
    if not isinstance(bringing, Bringing):
        raise NotRepeatableError
    return bringing.described()


def _signature(value: object) -> object:
    """An argument or a weight as far as it decides what a forward takes."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.storage_offset(), value.dtype)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    raise NotRepeatableError


def _described(value: object) -> object:
    """An attribute as far as it decides what a module does."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return _signature(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_described, value))
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        raise NotRepeatableError
    entries = getattr(value, "__dict__", None)
    if isinstance(value, type) or (callable(value) and not entries):
        return getattr(value, "__qualname__", kind)
    if entries is not None and all(isinstance(entry, _PLAIN) for entry in entries.values()):
        return (kind, *entries.items())
    # Of configurations equal modules hold the same one.
    return (kind, id(value))


def _kept_in(module: nn.Module) -> list[tuple[int, ...]]:
    """Which objects a module and those in it hold."""
    return [tuple(map(id, vars(part).values())) for part in module.modules()]


def _lists(value: object) -> list[list[Any]]:
    """Lists among arguments, which a forward may change."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    inner = [found for entry in value for found in _lists(entry)]
    return [value, *inner] if isinstance(value, list) else inner


def _known_of(taken: Taken, output: Any, lists: list[list[Any]], places: Places, trace: MemoryTrace) -> _Known:
    leaves, spec = tree_flatten((output, [list(own) for own in lists]))
    new: dict[int, int] = {}
    results: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            _signature(leaf)
            results.append(leaf)
            continue
        storage = leaf.untyped_storage()
        key = storage._cdata
        is_new = trace.made_since(key, taken)
        place, dtype = places.get(key, (-1, None))
        if not is_new and dtype != leaf.dtype:
            raise NotRepeatableError
        source = new.setdefault(key, len(new)) if is_new else place
        size, offset = tuple(leaf.shape), int(leaf.storage_offset())
        results.append(_Result(source, not is_new, storage.nbytes(), leaf.dtype, size, leaf.stride(), offset))
    return _Known(taken, tuple(results), spec)


def _made(known: _Known, given: list[Any]) -> Any:
    """The output, and the contents of the lists."""
    new: dict[int, Tensor] = {}
    leaves = []
    for leaf in known.leaves:
        if not isinstance(leaf, _Result):
            leaves.append(leaf)
            continue
        if leaf.given:
            base = given[leaf.source]
        elif leaf.source not in new:
            base = new[leaf.source] = torch.empty(leaf.nbytes // leaf.dtype.itemsize, dtype=leaf.dtype)
        else:
            base = new[leaf.source]
        leaves.append(base.as_strided(leaf.size, leaf.stride, leaf.offset))
    return tree_unflatten(leaves, known.spec)
