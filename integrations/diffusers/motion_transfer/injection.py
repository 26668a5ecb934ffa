"""Keys and values of the reference in place of the new video's, in chosen blocks.

As DiTFlow's released code does at guided steps: the reference is noised to the step with the run's own initial noise
and passed with the target prompt; keys and values of its video tokens then stand in for those of every branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.host.attention import Attention, AttentionCall, processors_wrapped
from corrdit.integrations.diffusers.host.forwards import EarlyExit, leaving_after
from corrdit.integrations.diffusers.layouts import TransformerLayout
from corrdit.integrations.diffusers.motion_transfer.attention_editing import (
    EditingProcessor,
    joined_with_text,
    video_part,
)

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of the video tokens, `[1, H, F * S, D]` each, by layer."""


@dataclass
class _Reading:
    """Keeps the keys and values of the video tokens; one for each layer, so that a compiled block serves them all."""

    grid: TokenGrid
    leave: bool
    found: tuple[Tensor, Tensor] | None = None

    def __call__(self, call: AttentionCall, attention: Attention) -> Tensor:
        self.found = (video_part(call.key, self.grid).clone(), video_part(call.value, self.grid).clone())
        if self.leave:
            raise EarlyExit
        return attention(call)


@torch.no_grad()
def keys_values_of(
    transformer: Module,
    layout: TransformerLayout,
    arguments: Mapping[str, object],
    grid: TokenGrid,
    layers: tuple[int, ...],
) -> KeysValues:
    """Keys and values of one forward, which ends after the last of the layers."""
    modules = layout.attention_modules(transformer)
    with leaving_after(transformer, layout, max(layers)) as leave:
        readings = {layer: _Reading(grid, leave and layer == max(layers)) for layer in layers}
        with processors_wrapped(modules, layers, lambda layer, inner: EditingProcessor(inner, readings[layer])):
            transformer(**arguments)
    return {layer: reading.found for layer, reading in readings.items() if reading.found is not None}


@contextlib.contextmanager
def injected(transformer: Module, layout: TransformerLayout, grid: TokenGrid, stored: KeysValues) -> Iterator[None]:
    """Inside the block, the layers attend to the stored keys and values in place of their own video tokens'."""

    def replacing(layer: int, inner: object) -> EditingProcessor:
        keys, values = stored[layer]

        def replace(call: AttentionCall, attention: Attention) -> Tensor:
            own = (call.key.shape[0], -1, -1, -1)
            k = joined_with_text(keys.expand(own).to(call.key), call.key, grid)
            v = joined_with_text(values.expand(own).to(call.value), call.value, grid)
            return attention(call.changed(call.query, k, v))

        return EditingProcessor(inner, replace)

    with processors_wrapped(layout.attention_modules(transformer), stored, replacing):
        yield
