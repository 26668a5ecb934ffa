"""Following memory and work of code that runs on fake tensors: every storage from its making to its end.

Fake tensors (`torch._subclasses.FakeTensorMode`) have shapes, types and lifetimes and no contents, so a model of any
size runs through the code that would run on a card, autograd included, in seconds. What a card's libraries take beside
torch's tensors (contexts, convolution workspaces, fragments between tensors) is not in it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from corrdit import kernels, motion, ops, reference, streaming

aten = torch.ops.aten

SAVED = "saved for backward"
KINDS = ("weights", SAVED, "activations", "operation", "codec")
"""What a storage is for. Activations are what is in use and not saved; "operation" is the workspace of corrdit's own
operations on queries and keys, in both passes."""

_OPERATIONS = tuple(room.__name__ for room in (kernels, motion, ops, reference, streaming))
_DEEPEST = 40
"""Frames of the stack that are looked at for an operation."""
_LARGEST_UNFOLDED = 20480
"""As torch's `use_mkldnn` has it: batch, channels, frames and rows multiplied."""
_BLOCK_OF_CHANNELS = 16
"""Of oneDNN's layouts with AVX-512."""
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
"""Attention as fake tensors on the CPU run it, and the operator of a card with the same work and the same results."""

OwnOperator = Callable[..., Any]
"""Runs in place of an operator, to show what the operator makes inside."""


@dataclass
class PhaseTrace:
    """What one phase of a task takes.

    Args:
        peak: bytes at the moment of the most, by kind.
        flop: floating-point operations (a multiplication and an addition are two).
    """

    peak: Counter[str] = field(default_factory=Counter)
    flop: float = 0.0

    @property
    def total(self) -> int:
        """Bytes at the moment of the most."""
        return sum(self.peak.values())


@dataclass
class Taken:
    """What a part of a phase takes beyond what is there as it begins.

    Args:
        most: bytes at the moment of the most, by kind; below 0 where something went.
        flop: floating-point operations.
        made: storages that had been made as it began.
    """

    most: Counter[str] = field(default_factory=Counter)
    flop: float = 0.0
    made: int = 0

    @property
    def total(self) -> int:
        """Bytes at the moment of the most."""
        return sum(self.most.values())


class MemoryTrace(TorchDispatchMode):
    """Counts every storage that is made inside, by what it is for, until it is gone.

    Args:
        own: functions to run in place of operators, by the operator's name such as "corrdit::soft_displacement".
        own_flop: work of such operators, by name.
        weights: tensors that were there before and are not counted.
        on_cpu: count what torch's convolutions of volumes take inside on a CPU. Libraries of cards choose their
            workspace themselves, it is not counted.
    """

    def __init__(
        self,
        own: Mapping[str, OwnOperator] | None = None,
        own_flop: Mapping[str, Callable[..., float]] | None = None,
        *,
        weights: Iterable[torch.Tensor] = (),
        on_cpu: bool = False,
    ) -> None:
        super().__init__()
        self._own, self._own_flop = own or {}, own_flop or {}
        self._live: Counter[str] = Counter()
        self._weights, self._on_cpu = list(weights), on_cpu
        self._storages: dict[int, list[Any]] = {}
        for tensor in self._weights:
            self._storages[tensor.untyped_storage()._cdata] = [0, "weights", 0]
        self._made = self._peak_made = 0
        self._kind: str | None = None
        self._in_backward = False
        self._phase = PhaseTrace()
        self._parts: list[tuple[Counter[str], Taken]] = []

    @contextlib.contextmanager
    def phase(self) -> Iterator[PhaseTrace]:
        """Inside, the peak is that of a new phase; what is alive as it begins counts."""
        self._phase, self._peak_made = PhaseTrace(Counter(self._live)), self._made
        with self:
            yield self._phase

    @contextlib.contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Inside, new storages are of this kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    @property
    def present_kind(self) -> str | None:
        """What new storages are for, where that was said."""
        return self._kind

    @contextlib.contextmanager
    def taken(self) -> Iterator[Taken]:
        """Follows a part of the phase."""
        part = Taken(flop=-self._phase.flop, made=self._made)
        self._parts.append((Counter(self._live), part))
        try:
            yield part
        finally:
            self._parts.pop()
            part.flop += self._phase.flop

    def repeat(self, part: Taken) -> None:
        """Count a part of a phase again."""
        self._phase.flop += part.flop
        self._update(part.most)

    def made_since(self, storage: int, part: Taken) -> bool:
        """Whether a storage, by its key, was made in a part."""
        return storage in self._storages and self._storages[storage][2] > part.made

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            # The value decides about an error or a warning; a number that is finite, true and above 0 passes.
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.equal.default:
            return True
        self._notice_backward()
        packet = func._overloadpacket
        name = func._schema.name
        if name in self._own:
            with self, self.kind("operation"):
                result = self._own[name](*args, **kwargs)
            self._phase.flop += self._own_flop[name](*args, **kwargs)
            return result
        result = func(*args, **kwargs)
        formula = flop_registry.get(_CPU_ATTENTION.get(packet, packet))
        if formula is not None:
            self._phase.flop += formula(*args, **kwargs, out_val=result)
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.see(value)
        if self._on_cpu and packet is aten.convolution and args[0].ndim == 5:
            self._update({self._kind or "activations": _inside_convolution(args[0], args[1], result)})
        return result

    def see(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        kind = kind or self._kind or ("operation" if _in_an_operation() else "activations")
        self._made += 1
        self._storages[key] = [size, kind, self._made]
        weakref.finalize(storage, self._gone, key)
        self._live[kind] += size
        self._update()

    def _gone(self, key: int) -> None:
        size, kind, _ = self._storages.pop(key)
        self._live[kind] -= size

    def _update(self, inside: Mapping[str, int] | None = None) -> None:
        """Note a new peak; `inside` are bytes by kind that come and go before anything else is counted."""
        inside = inside or {}
        total = sum(self._live.values()) + sum(inside.values())
        if total > self._phase.total:
            self._phase.peak, self._peak_made = _sum(self._live, inside), self._made
        for before, part in self._parts:
            if total - sum(before.values()) > part.total:
                part.most = _sum(self._live, inside)
                part.most.subtract(before)

    def _notice_backward(self) -> None:
        """What is alive as a backward pass begins was saved for it."""
        running = torch._C._current_graph_task_id() != -1
        if running != self._in_backward:
            # Behind it, what is left was not saved: results and gradients.
            before, now = (("activations", "operation"), SAVED) if running else ((SAVED,), "activations")
            for entry in self._storages.values():
                size, kind, made = entry
                if kind not in before:
                    continue
                entry[1] = now
                # A peak since it was made, as at the end of the forward pass, had it too.
                for held in (self._live, *((self._phase.peak,) if running and made <= self._peak_made else ())):
                    held[kind] -= size
                    held[now] += size
        self._in_backward = running


def _sum(live: Counter[str], inside: Mapping[str, int]) -> Counter[str]:
    found = Counter(live)
    found.update(inside)
    return found


def _inside_convolution(volume: torch.Tensor, kernel: torch.Tensor, result: torch.Tensor) -> int:
    """Bytes of a convolution inside, beside its result: of torch's own the input laid out once for each place of the
    kernel, of oneDNN's the result in blocks of channels, unless it is written as channels lie last."""
    if _unfolded(volume):
        return math.prod(kernel.shape[1:]) * result[:1, 0].numel() * result.element_size()
    if not volume.is_contiguous():
        return 0
    channels = math.ceil(result.shape[1] / _BLOCK_OF_CHANNELS) * _BLOCK_OF_CHANNELS
    return channels * result[:, 0].numel() * result.element_size()


def _unfolded(volume: torch.Tensor) -> bool:
    """Whether torch convolves a volume on the CPU by itself; larger ones and batches go to oneDNN."""
    return volume.ndim == 5 and len(volume) == 1 and math.prod(volume.shape[:4]) <= _LARGEST_UNFOLDED


def _in_an_operation() -> bool:
    frame, depth = sys._getframe(2), 0
    while frame is not None and depth < _DEEPEST:
        if frame.f_globals.get("__name__", "").startswith(_OPERATIONS):
            return True
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return False
