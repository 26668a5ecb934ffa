"""Noticing a transformer's forwards: the processors of a capture are armed before one that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, forward_arguments
from corrdit.integrations.diffusers.processors import CorrespondenceProcessor, ReadRequest


class CaptureOwner(Protocol):
    """What a watch asks of its capture."""

    def requests(self, layout: TransformerLayout, call: ForwardCall, stop: bool) -> Mapping[int, ReadRequest]:
        """What each layer has to hand over in this call; empty if the call is not wanted."""
        ...


class ForwardWatch:
    """Arms the processors of one transformer before a forward that is wanted, and disarms them after it.

    Args:
        owner: the capture.
        layout: of the transformer.
        processors: by layer.
        stop: whether the forward ends after the last of the layers.
    """

    def __init__(
        self,
        owner: CaptureOwner,
        layout: TransformerLayout,
        processors: Mapping[int, CorrespondenceProcessor],
        stop: bool,
    ) -> None:
        self._owner = owner
        self._layout = layout
        self._processors = processors
        self._stop = stop

    def before(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        call = self._layout.read_call(transformer, forward_arguments(transformer, args, kwargs))
        for layer, request in self._owner.requests(self._layout, call, self._stop).items():
            self._processors[layer].arm(request)

    def after(self, transformer: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, called after an exception as well."""
        try:
            for processor in self._processors.values():
                processor.collect_compiled()
        finally:
            self.disarm()

    def disarm(self) -> None:
        """Let the processors pass everything through."""
        for processor in self._processors.values():
            processor.disarm()


class RemovableHook:
    """A forward hook that a pickled or copied module does not take along."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_hook_of_a_copy, ())


def _hook_of_a_copy() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    """What a capture's hook becomes in a copy of the model."""
