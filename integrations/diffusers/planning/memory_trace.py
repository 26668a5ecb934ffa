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


class MemoryTrace(TorchDispatchMode):
    """Counts every storage that is made inside, by what it is for, until it is gone.

    Args:
        own: functions to run in place of operators, by the operator's name such as "corrdit::soft_displacement".
        own_flop: work of such operators, by name.
        weights: tensors that were there before and are not counted.
        on_cpu: count what torch's convolutions of small volumes take inside on a CPU: the input laid out once for each
            place of the kernel. Libraries of cards choose their workspace themselves, it is not counted.
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
        if self._on_cpu and packet is aten.convolution and _unfolded(args[0]):
            self._update(math.prod(args[1].shape[1:]) * result[:1, 0].numel() * result.element_size())
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

    def _update(self, inside: int = 0) -> None:
        """Note a new peak; `inside` are bytes that an operator takes and gives back."""
        if sum(self._live.values()) + inside > self._phase.total:
            self._phase.peak, self._peak_made = Counter(self._live), self._made
            if inside:
                self._phase.peak[self._kind or "activations"] += inside

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
