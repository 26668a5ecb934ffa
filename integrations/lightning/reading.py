"""Opening and closing a capture round the batches of a Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from corrdit.integrations.diffusers.captures import Capture, capture
from corrdit.integrations.diffusers.layouts import forward_arguments, layout_of
from corrdit.integrations.lightning.discovery import layer_count, transformer_of

Deliver = Callable[[int, int, torch.Tensor, Any], None]


class BatchReading:
    """One capture at a time over a model, with the timesteps of the forward that each result comes from.

    Args:
        model: pipeline or transformer.
        layers: as `corrdit.capture` takes them, or "all".
        steps: as `corrdit.capture` takes them.
        operation: as `corrdit.capture` takes it.
        deliver: `deliver(step, layer, timesteps [B or 1], result)`, called as results come.
    """

    def __init__(
        self, model: Any, *, layers: int | Iterable[int] | str, steps: Any, operation: Any, deliver: Deliver
    ) -> None:
        self.model = model
        self.options = {"layers": layer_indices(model, layers), "steps": steps, "operation": operation}
        self.deliver = deliver
        self._capture: Capture | None = None
        self._hook: Any = None
        self._timesteps = torch.zeros(1)

    def open(self) -> None:
        """Attach to the model."""
        reader = capture(self.model, **self.options, callback=self._receive)
        reader.__enter__()
        self._capture = reader
        self._hook = transformer_of(self.model).register_forward_pre_hook(self._note_timesteps, with_kwargs=True)

    def close(self, error: BaseException | None = None) -> None:
        """Restore the model.

        Raises:
            ValueError: without `error`, where the model did not run since `open`.
        """
        reader, self._capture = self._capture, None
        if reader is None:
            return
        self._hook.remove()
        reader.__exit__(type(error) if error is not None else None, error, None)

    def _note_timesteps(self, transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Mapping[str, Any] = forward_arguments(transformer, args, kwargs)
        call = layout_of(transformer).read_call(transformer, arguments)
        self._timesteps = torch.as_tensor(call.timestep).detach().reshape(-1).float().cpu()

    def _receive(self, step: int, layer: int, result: Any) -> None:
        self.deliver(step, layer, self._timesteps, result)


def layer_indices(model: Any, layers: int | Iterable[int] | str) -> list[int]:
    """Non-negative indices of the layers asked for, in order.

    Raises:
        ValueError: an unknown word or an index out of range.
    """
    count = layer_count(model)
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers must be whole numbers or "all", got {layers!r}')
        return list(range(count))
    indices = list(layers) if isinstance(layers, Iterable) else [layers]
    for layer in indices:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
            raise ValueError(f"layer {layer!r} is outside the model, which has layers 0 to {count - 1}")
    return sorted({layer % count for layer in indices})
