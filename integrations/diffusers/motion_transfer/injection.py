"""Keys and values of the reference in place of the new video's, in chosen blocks.

As DiTFlow's released code does at guided steps: the reference is noised to the step with the run's own initial noise
and passed with the target prompt; keys and values of its video tokens then stand in for those of every branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.early_exit import leaving_after
from corrdit.integrations.diffusers.layouts import TransformerLayout
from corrdit.integrations.diffusers.motion_transfer.attention_editing import (
    Edit,
    EditingProcessor,
    joined_with_text,
    processors_wrapped,
    video_part,
)
from corrdit.integrations.diffusers.processors import EarlyExit

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of the video tokens, `[1, H, F * S, D]` each, by layer."""


@torch.no_grad()
def keys_values_of(
    transformer: torch.nn.Module,
    layout: TransformerLayout,
    arguments: Mapping[str, Any],
    grid: TokenGrid,
    layers: tuple[int, ...],
) -> KeysValues:
    """Keys and values of one forward, which ends after the last of the layers."""
    kept: KeysValues = {}
    modules = layout.attention_modules(transformer)
    with contextlib.ExitStack() as stack:
        leave = stack.enter_context(leaving_after(transformer, layout, max(layers)))

        def reader(layer: int) -> Edit:
            def read(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                kept[layer] = (video_part(k, grid).clone(), video_part(v, grid).clone())
                if leave and layer == max(layers):
                    raise EarlyExit
                return q, k, v

            return read

        chosen = {layer: modules[layer] for layer in layers}
        stack.enter_context(processors_wrapped(chosen, lambda layer, inner: EditingProcessor(inner, reader(layer))))
        transformer(**arguments)
    return kept


@contextlib.contextmanager
def injected(
    transformer: torch.nn.Module, layout: TransformerLayout, grid: TokenGrid, stored: KeysValues
) -> Iterator[None]:
    """Inside the block, the layers attend to the stored keys and values in place of their own video tokens'."""

    def replacing(layer: int) -> Edit:
        keys, values = stored[layer]

        def replace(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            own = (k.shape[0], -1, -1, -1)
            return (
                q,
                joined_with_text(keys.expand(own).to(k), k, grid),
                joined_with_text(values.expand(own).to(v), v, grid),
            )

        return replace

    modules = layout.attention_modules(transformer)
    chosen = {layer: modules[layer] for layer in stored}
    with processors_wrapped(chosen, lambda layer, inner: EditingProcessor(inner, replacing(layer))):
        yield
