"""Holding a capture, or another change of the model, open round single batches of a Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import BatchSampler, DistributedSampler

from corrdit.arguments import resolved_index
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.diffusers.host.forwards import transformers_of, watched_forwards
from corrdit.integrations.diffusers.host.layers import layer_count
from corrdit.integrations.diffusers.layouts import ForwardCall, layout_of
from corrdit.integrations.diffusers.processors import Operation
from corrdit.integrations.lightning.discovery import VideoModel

Deliver = Callable[[int, int, torch.Tensor, Any], None]
"""`deliver(step, layer, timesteps [B of the call], result)`"""


class BatchCallback(Callback):
    """A callback that has a context open while one batch runs, and closes it after an exception too."""

    _open: AbstractContextManager[object] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a context was entered and not left."""
        return self._open is not None

    def open(self, context: AbstractContextManager[object]) -> None:
        """Enter a context until `close`."""
        context.__enter__()
        self._open = context

    def close(self, error: BaseException | None = None) -> None:
        """Leave what is open, with the exception that ended the batch, if any."""
        context, self._open = self._open, None
        if context is not None:
            context.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model whatever happened in the batch."""
        self.close(exception)


@contextmanager
def timed_capture(
    model: VideoModel, *, layers: list[int], steps: list[int] | None, operation: Operation, deliver: Deliver
) -> Iterator[None]:
    """A capture that hands over each result with the timesteps of the forward that it comes from.

    Args:
        model: pipeline or transformer.
        layers, steps, operation: as `corrdit.capture` takes them.
        deliver: called as results come.

    Raises:
        ValueError: what `corrdit.capture` refuses; at the end of the block, where the model did not run in it.
    """
    timesteps = torch.zeros(1)

    def note_timesteps(call: ForwardCall, arguments: dict[str, Any]) -> None:
        nonlocal timesteps
        timesteps = sample_timesteps(call)

    def receive(step: int, layer: int, result: object) -> None:
        deliver(step, layer, timesteps, result)

    with ExitStack() as stack:
        stack.enter_context(capture(model, layers=layers, steps=steps, operation=operation, callback=receive))
        for transformer in transformers_of(model):
            layout = layout_of(transformer)
            stack.enter_context(watched_forwards(transformer, layout, note_timesteps, lambda output: None))
        yield


def sample_timesteps(call: ForwardCall) -> torch.Tensor:
    """The timestep of each sample of a call, float32 `[B]`; of one whose tokens have their own, the noisiest."""
    timesteps = torch.as_tensor(call.timestep).detach().float().cpu()
    if timesteps.ndim == 0 or timesteps.shape[0] != call.batch:
        return timesteps.reshape(-1).max().expand(call.batch)
    return timesteps.reshape(call.batch, -1).amax(dim=1)


def repeated_items(loader: object, batch: int) -> list[bool] | None:
    """Of each item of a process's batch, whether a distributed sampler repeats it to even out the processes.

    torch's sampler appends items from the beginning, so what it repeats stands behind the number of items it has.

    Args:
        loader: dataloader of the process.
        batch: number of the batch on this process.

    Returns:
        Empty where the sampler repeats nothing, or is none of torch's and Lightning's; None where it does, and a batch
        sampler with an order of its own puts the items where they cannot be found.
    """
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or type(sampler).__iter__ not in _EVENING_OUT:
        return []
    items = len(cast(Sized, sampler.dataset))
    if sampler.total_size <= items:
        return []
    # Lightning wraps the batch sampler of predictions.
    ordered = getattr(batches, "_batch_sampler", batches)
    if ordered is not None and type(ordered).__iter__ is not BatchSampler.__iter__:
        return None
    size = 1 if ordered is None else ordered.batch_size
    places = range(sampler.rank, sampler.total_size, sampler.num_replicas)[batch * size : (batch + 1) * size]
    return [place >= items for place in places]


_EVENING_OUT = (DistributedSampler.__iter__, DistributedSamplerWrapper.__iter__)


def layer_indices(model: VideoModel, layers: list[int] | str) -> list[int]:
    """Non-negative indices of the layers asked for, in order.

    Raises:
        ValueError: an index out of range.
    """
    count = layer_count(model)
    wanted = range(count) if isinstance(layers, str) else layers
    return sorted(
        {resolved_index("layer", layer, count, f"the model, which has layers 0 to {count - 1}") for layer in wanted}
    )
