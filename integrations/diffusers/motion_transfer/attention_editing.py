"""Changing queries, keys and values between the stock processor's projections and its attention.

Injection puts keys and values (or queries) of the reference in place of the new video's, in chosen blocks, as DiTFlow's
released code does with the former at guided steps: the reference is noised to the step with the run's own initial noise
and passed with the target prompt; those of its video tokens then stand in for those of every branch.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.compatibility import check_processor
from corrdit.integrations.diffusers.host.attention import (
    Attention,
    AttentionCall,
    DelegatingProcessor,
    Interceptor,
    Interceptors,
    processors_wrapped,
)
from corrdit.integrations.diffusers.host.forwards import EarlyExit, leaving_after
from corrdit.integrations.diffusers.layouts import TransformerLayout

ROTARY_ARGUMENTS = ("image_rotary_emb", "rotary_emb")
"""What processors call the rotary tables they are given."""
AttentionParts = dict[int, dict[str, Tensor]]
"""Of "query", "key" and "value" of the video tokens, `[1, H, F * S, D]` each, by layer and name."""


class EditingProcessor(DelegatingProcessor):
    """Drop-in attention processor that changes what the attention is computed from.

    Args:
        inner: the processor it delegates to.
        edit: sees the calls of attention before any reader does.
        rotary: `rotary(tables)` is shown the rotary tables the inner processor is given, which it then does not
            get: `edit` has to apply them. None leaves them to the inner processor.
    """

    def __init__(self, inner: object, edit: Interceptor, *, rotary: Callable[[object], None] | None = None) -> None:
        check_processor(inner)
        super().__init__(inner)
        self._edit = edit
        self._rotary = rotary
        names = list(inspect.signature(type(inner).__call__).parameters)  # type: ignore[operator]
        # Name, and position behind the attention module.
        self._tables = [(name, names.index(name) - 2) for name in ROTARY_ARGUMENTS if name in names]

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output, from edited queries, keys and values."""
        if self._rotary is not None:
            for name, position in self._tables:
                if kwargs.get(name) is not None:
                    self._rotary(kwargs[name])
                    kwargs = {**kwargs, name: None}
                elif len(args) > position and args[position] is not None:
                    self._rotary(args[position])
                    args = (*args[:position], None, *args[position + 1 :])
        return self.delegated((self._edit, *interceptors), attn, *args, **kwargs)


def joined_with_text(video: Tensor, original: Tensor, grid: TokenGrid) -> Tensor:
    """`[B, H, N, D]` with the video tokens of `original` replaced; a new tensor.

    A family that drops text padding has fewer text tokens in `original` than the grid; they keep their side.
    """
    if original.shape[2] == grid.video_tokens:
        return video
    text = slice(None, original.shape[2] - grid.video_tokens) if grid.text_first else slice(grid.video_tokens, None)
    parts = [original[:, :, text], video]
    return torch.cat(parts if grid.text_first else parts[::-1], dim=2)


def video_part(tensor: Tensor, grid: TokenGrid) -> Tensor:
    """The video tokens of `[B, H, N, D]`."""
    start = tensor.shape[2] - grid.video_tokens if grid.text_first else 0
    return tensor[:, :, start : start + grid.video_tokens]


@dataclass
class _Reading:
    """Keeps parts of the video tokens; one for each layer, so that a compiled block serves them all."""

    grid: TokenGrid
    parts: tuple[str, ...]
    leave: bool
    found: dict[str, Tensor] | None = None

    def __call__(self, call: AttentionCall, attention: Attention) -> Tensor:
        self.found = {part: video_part(getattr(call, part), self.grid).clone() for part in self.parts}
        if self.leave:
            raise EarlyExit
        return attention(call)


@torch.no_grad()
def attention_parts_of(
    transformer: Module,
    layout: TransformerLayout,
    arguments: Mapping[str, object],
    grid: TokenGrid,
    layers: tuple[int, ...],
    parts: tuple[str, ...],
) -> AttentionParts:
    """Some of "query", "key" and "value" of one forward, which ends after the last of the layers."""
    modules = layout.attention_modules(transformer)
    with leaving_after(transformer, layout, max(layers)) as leave:
        readings = {layer: _Reading(grid, parts, leave and layer == max(layers)) for layer in layers}
        with processors_wrapped(modules, layers, lambda layer, inner: EditingProcessor(inner, readings[layer])):
            transformer(**arguments)
    return {layer: reading.found for layer, reading in readings.items() if reading.found is not None}


@contextlib.contextmanager
def injected(
    transformer: Module,
    layout: TransformerLayout,
    grid: TokenGrid,
    stored: AttentionParts,
    region: Tensor | None = None,
) -> Iterator[None]:
    """Inside the block, the layers attend with the stored parts in place of their own video tokens'.

    Args:
        transformer: whose layers they are.
        layout: of it.
        grid: of its forwards.
        stored: what takes their place.
        region: bool `[F, h, w]`, the tokens whose own are replaced; None for all.
    """

    def replacing(layer: int, inner: object) -> EditingProcessor:
        def replaced(part: str, own: Tensor) -> Tensor:
            if part not in stored[layer]:
                return own
            others = stored[layer][part].expand(own.shape[0], -1, -1, -1).to(own)
            if region is not None:
                inside = region.to(own.device).flatten()[None, None, :, None]
                others = torch.where(inside, others, video_part(own, grid))
            return joined_with_text(others, own, grid)

        def replace(call: AttentionCall, attention: Attention) -> Tensor:
            q, k, v = (replaced(part, getattr(call, part)) for part in ("query", "key", "value"))
            return attention(call.changed(q, k, v))

        return EditingProcessor(inner, replace)

    with processors_wrapped(layout.attention_modules(transformer), stored, replacing):
        yield
