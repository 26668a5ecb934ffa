"""Opening and closing a capture round the batches of a Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from corrdit.integrations.diffusers.captures import Capture, capture
from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.indices import resolved_index, whole_indices
from corrdit.integrations.diffusers.layouts import ForwardCall, forward_arguments, layout_of
from corrdit.integrations.lightning.discovery import layer_count

Deliver = Callable[[int, int, torch.Tensor, Any], None]


class BatchReading:
    """One capture at a time over a model, with the timesteps of the forward that each result comes from.

    Args:
        model: pipeline or transformer.
        layers: whole numbers, or "all".
        steps: as `corrdit.capture` takes them.
        operation: as `corrdit.capture` takes it.
        deliver: `deliver(step, layer, timesteps [B of the call], result)`, called as results come.
    """

    def __init__(self, model: Any, *, layers: list[int] | str, steps: Any, operation: Any, deliver: Deliver) -> None:
        self.model = model
        self.options = {"layers": layer_indices(model, layers), "steps": steps, "operation": operation}
        self.deliver = deliver
        self._capture: Capture | None = None
        self._hooks: list[Any] = []
        self._timesteps = torch.zeros(1)

    def open(self) -> None:
        """Attach to the model."""
        reader = capture(self.model, **self.options, callback=self._receive)
        reader.__enter__()
        self._capture = reader
        self._hooks = [
            transformer.register_forward_pre_hook(self._note_timesteps, with_kwargs=True)
            for transformer in transformers_of(self.model)
        ]

    def close(self, error: BaseException | None = None) -> None:
        """Restore the model.

        Raises:
            ValueError: without `error`, where the model did not run since `open`.
        """
        reader = self._released()
        if reader is not None:
            reader.__exit__(type(error) if error is not None else None, error, None)

    def abandon(self) -> None:
        """Restore the model, whether it ran or not."""
        reader = self._released()
        if reader is not None:
            reader.close()

    def _released(self) -> Capture | None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        reader, self._capture = self._capture, None
        return reader

    def _note_timesteps(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Mapping[str, Any] = forward_arguments(transformer, args, kwargs)
        call = layout_of(transformer).read_call(transformer, arguments)
        self._timesteps = sample_timesteps(call)

    def _receive(self, step: int, layer: int, result: Any) -> None:
        self.deliver(step, layer, self._timesteps, result)


def sample_timesteps(call: ForwardCall) -> torch.Tensor:
    """The timestep of each sample of a call, float32 `[B]`; of one whose tokens have their own, the noisiest."""
    timesteps = torch.as_tensor(call.timestep).detach().float().cpu()
    if timesteps.ndim == 0 or timesteps.shape[0] != call.batch:
        return timesteps.reshape(-1).max().expand(call.batch)
    return timesteps.reshape(call.batch, -1).amax(dim=1)


def layer_list(layers: int | Iterable[int] | str) -> list[int] | str:
    """Layers as they are given to a callback: "all", or whole numbers as a list, which a generator is only once.

    Raises:
        ValueError: another word, or anything but whole numbers.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers must be whole numbers or "all", got {layers!r}')
        return layers
    return whole_indices("layers", layers)


def layer_indices(model: Any, layers: list[int] | str) -> list[int]:
    """Non-negative indices of the layers asked for, in order.

    Raises:
        ValueError: an index out of range.
    """
    count = layer_count(model)
    if isinstance(layers, str):
        return list(range(count))
    found = {layer: resolved_index("layers", layer, count) for layer in layers}
    for layer, index in found.items():
        if index is None:
            raise ValueError(f"layer {layer} is outside the model, which has layers 0 to {count - 1}")
    return sorted({index for index in found.values() if index is not None})
