"""Which attention layers of a model are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from corrdit.arguments import whole_indices
from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.layouts import layout_of

Layers = int | Iterable[int] | str
"""Whole numbers, negative ones from the last, or "all"."""


def layer_list(layers: Layers) -> list[int] | Literal["all"]:
    """Layers as they are given: "all", or whole numbers as a list, which a generator is only once.

    Raises:
        ValueError: another word, or anything but whole numbers.
    """
    if not isinstance(layers, str):
        return whole_indices("layers", layers)
    if layers != "all":
        raise ValueError(f'layers must be whole numbers or "all", got {layers!r}')
    return "all"


def layer_count(model: object) -> int:
    """Attention layers that every transformer of a pipeline, or a bare transformer, has; 0 without a transformer."""
    modules = (layout_of(transformer).attention_modules(transformer) for transformer in transformers_of(model))
    return min(map(len, modules), default=0)
