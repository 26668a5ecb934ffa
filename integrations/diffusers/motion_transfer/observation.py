"""Running a transformer up to the blocks whose motion is read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.captures import Capture
from corrdit.integrations.diffusers.host.forwards import EarlyExit, leaving_after, watched_output
from corrdit.integrations.diffusers.layouts import TransformerLayout
from corrdit.integrations.diffusers.motion_transfer.objectives import (
    AttentionReading,
    FeatureReading,
    PredictionReading,
    TextReading,
)
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.processors import Operation
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

ReadBlock = Callable[[int, Any], Any]
"""`function(block, reading)`, called while the forward's tensors are there."""


@dataclass(frozen=True)
class Reader:
    """Makes readings for an objective out of what a forward holds.

    Args:
        settings: of the transfer.
        region: bool `[F, h, w]` of tokens; None for all.
        words: of the prompt of the forward.
    """

    settings: TransferSettings
    region: Tensor | None = None
    words: PromptWords | None = None

    def operation(self, function: Callable[[AttentionReading], Any]) -> Operation:
        """A function of readings of attention as an operation of a capture."""

        def operation(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Any:
            return function(AttentionReading(q=q, k=k, grid=grid, key_mask=key_mask, **self._shared()))

        return operation

    def text_operation(self, function: Callable[[TextReading], Any]) -> Operation:
        """A function of readings of attention to the text as an operation of a capture."""

        def operation(q: Tensor, k: Tensor, grid: CrossGrid, key_mask: Tensor | None) -> Any:
            video = TokenGrid(grid.frames, grid.height, grid.width)
            return function(TextReading(q=q, k=k, text=grid, grid=video, key_mask=key_mask, **self._shared()))

        return operation

    def features(self, features: Tensor, grid: TokenGrid) -> FeatureReading:
        """The reading of features `[F, C, h, w]`."""
        return FeatureReading(features=features, grid=grid, **self._shared())

    def prediction(self, clean: Tensor, grid: TokenGrid) -> PredictionReading:
        """The reading of predicted clean latents `[F, C, h, w]`."""
        return PredictionReading(clean=clean, grid=grid, **self._shared())

    def blocks(
        self,
        reads: str,
        transformer: Module,
        layout: TransformerLayout,
        arguments: Mapping[str, object],
        grid: TokenGrid,
        function: ReadBlock,
    ) -> dict[int, Any]:
        """`function(block, reading)` for the settings' blocks in one forward, which ends after the last of them.

        Args:
            reads: "attention", "text" or "features".
            transformer: to run once.
            layout: of it.
            arguments: of its forward, by name.
            grid: of the forward.
            function: its results stay attached to the graph where gradients are on.
        """
        blocks = self.settings.blocks
        if reads == "features":
            # Behind the forward: gradient checkpointing would not find the function's graph in its second run.
            maps = features_observed(transformer, layout, arguments, grid, blocks)
            return {block: function(block, self.features(maps[block], grid)) for block in blocks}
        made = self.text_operation if reads == "text" else self.operation
        operations = {block: {"read": made(functools.partial(function, block))} for block in blocks}
        observed = attention_observed(transformer, arguments, operations, of_text=reads == "text")
        return {block: observed[block]["read"] for block in blocks}

    def _shared(self) -> dict[str, Any]:
        return {"settings": self.settings, "region": self.region, "words": self.words}


def attention_observed(
    transformer: Module,
    arguments: Mapping[str, object],
    operations: Mapping[int, Mapping[str, Operation]],
    *,
    of_text: bool = False,
) -> dict[int, dict[str, Any]]:
    """Results of operations on queries and keys, by layer and name; the forward ends after the last layer.

    Args:
        transformer: to run once.
        arguments: of its forward, by name.
        operations: by layer (counted from 0) and name. Results stay attached to the graph where gradients are on.
        of_text: they are of the attention to the text.
    """
    reader = Capture(
        transformer,
        operations=operations,
        named=True,
        keep_graph=torch.is_grad_enabled(),
        early_exit=True,
        attention="cross" if of_text else "self",
    )
    with reader:
        transformer(**arguments)
    return {layer: reader[0, layer] for layer in operations}


def features_observed(
    transformer: Module,
    layout: TransformerLayout,
    arguments: Mapping[str, object],
    grid: TokenGrid,
    layers: tuple[int, ...],
) -> dict[int, Tensor]:
    """The blocks' outputs for the video tokens, `[F, C, h, w]`, by layer.

    Arguments as for `attention_observed`; the forward ends after the last block.

    Raises:
        ValueError: blocks whose output is not one vector for each video token.
    """
    blocks = [block for name in layout.block_lists(transformer) for block in transformer.get_submodule(name).children()]
    results: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        # Gradient checkpointing runs the block again in the backward pass.
        if layer in results:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3 or hidden.shape[1] != grid.video_tokens:
            raise ValueError(
                f"the output of block {layer} has shape {list(hidden.shape)}, which is not one vector for each of the "
                f"{grid.video_tokens} video tokens; this method cannot read it"
            )
        maps = hidden[-1].unflatten(0, (grid.frames, grid.height, grid.width))
        results[layer] = maps.movedim(-1, 1)
        if stop and layer == max(layers):
            raise EarlyExit

    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(leaving_after(transformer, layout, max(layers)))
        for layer in layers:
            stack.enter_context(watched_output(blocks[layer], functools.partial(keep, layer)))
        transformer(**arguments)
    return results


@contextlib.contextmanager
def gradient_checkpointing(transformer: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing on inside the block, if wanted, and as it was after it.

    Raises:
        ValueError: a transformer that does not have it.
    """
    if not wanted or getattr(transformer, "is_gradient_checkpointing", False):
        yield
        return
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(transformer).__name__} has no gradient checkpointing; leave gradient_checkpointing out"
        )
    transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        transformer.disable_gradient_checkpointing()
