"""Keys and values of the reference in place of the new video's, in chosen blocks.

As DiTFlow's released code does at guided steps: the reference is noised to the step with the run's own initial noise
and passed with the target prompt; keys and values of its video tokens then stand in for those of every branch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.compatibility import check_processor
from corrdit.integrations.diffusers.host.attention import (
    Attention,
    AttentionCall,
    DelegatingProcessor,
    Interceptor,
    processors_wrapped,
)
from corrdit.integrations.diffusers.host.forwards import EarlyExit, leaving_after
from corrdit.integrations.diffusers.layouts import TransformerLayout
from corrdit.integrations.diffusers.motion_transfer.attention_editing import (
    Edit,
    EditingProcessor,
    joined_with_text,
    video_part,
)

KeysValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of the video tokens, `[1, H, F * S, D]` each, by layer."""


class _KeysValuesReader(DelegatingProcessor):
    """Keeps the keys and values of the video tokens.

    In an attribute of its own, so that a block compiled with it serves every layer.
    """

    kept: tuple[Tensor, Tensor] | None = None

    def __init__(self, inner: object, grid: TokenGrid, leave: bool) -> None:
        check_processor(inner)
        super().__init__(inner)
        self._grid, self._leave = grid, leave

    def call(
        self,
        interceptors: tuple[Interceptor, ...],
        attn: torch.nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        return self.delegated((*interceptors, self._read), attn, args, kwargs)

    def _read(self, call: AttentionCall, attention: Attention) -> Tensor:
        self.kept = (video_part(call.key, self._grid).clone(), video_part(call.value, self._grid).clone())
        if self._leave:
            raise EarlyExit
        return attention(call)


@torch.no_grad()
def keys_values_of(
    transformer: torch.nn.Module,
    layout: TransformerLayout,
    arguments: Mapping[str, object],
    grid: TokenGrid,
    layers: tuple[int, ...],
) -> KeysValues:
    """Keys and values of one forward, which ends after the last of the layers."""
    modules = layout.attention_modules(transformer)
    readers: dict[int, _KeysValuesReader] = {}
    with contextlib.ExitStack() as stack:
        leave = stack.enter_context(leaving_after(transformer, layout, max(layers)))

        def reader(layer: int, inner: object) -> _KeysValuesReader:
            readers[layer] = _KeysValuesReader(inner, grid, leave and layer == max(layers))
            return readers[layer]

        stack.enter_context(processors_wrapped({layer: modules[layer] for layer in layers}, reader))
        transformer(**arguments)
    return {layer: reader.kept for layer, reader in readers.items() if reader.kept is not None}


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
