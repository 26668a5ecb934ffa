"""Queries, keys and intermediate features of all wanted layers while a model runs, as small readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.captures import Capture
from corrdit.integrations.diffusers.compatibility import has_compiled_blocks
from corrdit.integrations.diffusers.host.forwards import RemovableHook
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout
from corrdit.integrations.diffusers.processors import Operation, ReadRequest

FeatureOperation = Callable[[Tensor, TokenGrid], object]
Deliver = Callable[[int, int, str, Any], None]


class ReadingCapture(Capture):
    """A capture which also hands the attention output before and after its projection to an operation.

    Results go to `deliver(step, layer, name, result)` as they come, and nothing is kept: name is "attention" for the
    operation on queries and keys, "attention output" and "projected output" for features `[1, F*S, C]` of the video
    tokens.

    The single-stream blocks of HunyuanVideo project attention and feed-forward jointly; there the projected output is
    the attention's share of it.

    Args:
        model: a pipeline, read in its conditional branch, or a bare transformer.
        layers: non-negative indices.
        steps: non-negative indices of a pipeline's steps, or None.
        operation: on queries and keys.
        feature_operation: on features, or None to leave them out.
        deliver: takes the results.

    Raises:
        ValueError: as `capture`; features of a model with compiled blocks.
    """

    def __init__(
        self,
        model: Any,
        *,
        layers: tuple[int, ...],
        steps: tuple[int, ...] | None,
        operation: Operation,
        feature_operation: FeatureOperation | None,
        deliver: Deliver,
    ) -> None:
        super().__init__(
            model,
            operations={layer: {"attention": operation} for layer in layers},
            steps=None if steps is None else list(steps),
            callback=lambda step, layer, result: deliver(step, layer, "attention", result),
        )
        self._feature_operation = feature_operation
        self._give = deliver
        self._running: Mapping[int, ReadRequest] = {}
        self._step = -1

    def __enter__(self) -> ReadingCapture:
        if self._feature_operation is not None and any(has_compiled_blocks(each) for each, _ in self._models):
            raise ValueError(
                "features cannot be read from compiled blocks; leave features out or do not compile the transformer"
            )
        super().__enter__()
        assert self._open is not None
        try:
            for transformer, layout in self._models if self._feature_operation is not None else ():
                for layer, module in enumerate(layout.attention_modules(transformer)):
                    if layer in self._operations:
                        self._open.callback(self._watched(transformer, layer, module).remove)
        except BaseException:
            self.close()
            raise
        return self

    def requests(self, layout: TransformerLayout, call: ForwardCall, stop: bool) -> dict[int, ReadRequest]:
        """As the base class; also notes which samples of the running forward are wanted."""
        requests = super().requests(layout, call, stop)
        self._running, self._step = requests, self._counter.step
        return requests

    def _watched(self, transformer: torch.nn.Module, layer: int, module: torch.nn.Module) -> RemovableHandle:
        projection = _projection_of(module)
        if projection is not None:
            return projection.register_forward_hook(
                RemovableHook(lambda part, inputs, output: self._take(layer, inputs[0], output))
            )
        block: Any = next(part for part in transformer.modules() if module in part.children())
        joint = block.proj_out

        def take_share(part: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            hidden = output[0]
            self._take(layer, hidden, F.linear(hidden, joint.weight[:, : hidden.shape[-1]], joint.bias))

        return module.register_forward_hook(RemovableHook(take_share))

    def _take(self, layer: int, before: Tensor, after: Tensor) -> None:
        request = self._running.get(layer)
        if request is None or self._feature_operation is None:
            return
        assert isinstance(request.grid, TokenGrid)
        for _, rows in request.rows:
            for name, features in (("attention output", before), ("projected output", after)):
                samples = features if features.ndim > 2 else features[None]
                result = self._feature_operation(video_features(samples[rows].detach(), request.grid), request.grid)
                self._give(self._step, layer, name, result)


def _projection_of(module: Any) -> torch.nn.Module | None:
    """What projects the output of an attention module; None where its block does, together with something else."""
    listed, single = getattr(module, "to_out", None), getattr(module, "out_layer", None)
    if isinstance(listed, torch.nn.Linear):
        # Of the text, in Cosmos 3; the video has its own.
        listed, single = None, module.to_add_out
    projection: torch.nn.Module | None = single if listed is None else listed[0]
    return projection


def video_features(features: Tensor, grid: TokenGrid) -> Tensor:
    """The video tokens `[B, F*S, C]` of features that hold them alone or with the text.

    Raises:
        ValueError: another number of tokens.
    """
    if features.shape[1] == grid.video_tokens:
        return features
    if features.shape[1] == grid.tokens:
        return features[:, grid.video_slice]
    raise ValueError(
        f"the attention gives {features.shape[1]} tokens; expected are {grid.video_tokens} video tokens, alone or "
        f"with {grid.text_tokens} of text"
    )


class ForwardBackbone(Protocol):
    """What a single forward needs of a backbone."""

    def transformer_at(self, timestep: float) -> torch.nn.Module: ...

    def forward_arguments(
        self,
        latents: Tensor,
        timestep: float,
        *,
        prompt_embeds: Tensor | Mapping[str, Tensor] | None = ...,
        image: Tensor | None = ...,
    ) -> dict[str, Any]: ...


def reading_forward(
    backbone: ForwardBackbone,
    latents: Tensor,
    timestep: float,
    *,
    layers: tuple[int, ...],
    operation: Operation,
    feature_operation: FeatureOperation | None,
    deliver: Callable[[int, str, Any], None],
    text: Mapping[str, Tensor] | None = None,
    image: Tensor | None = None,
) -> None:
    """One call of the transformer; readings go to `deliver(layer, name, result)`.

    Args:
        backbone: of `load_backbone`.
        latents: `[F, C, h, w]` as the backbone encodes them.
        timestep: as the scheduler counts it.
        layers, operation, feature_operation: as for `ReadingCapture`.
        deliver: takes the results.
        text: the transformer's text arguments; None for the empty prompt.
        image: as `Backbone.forward` takes it.
    """
    transformer = backbone.transformer_at(timestep)
    arguments = backbone.forward_arguments(latents, timestep, prompt_embeds=text, image=image)
    reader = ReadingCapture(
        transformer,
        layers=layers,
        steps=None,
        operation=operation,
        feature_operation=feature_operation,
        deliver=lambda step, layer, name, result: deliver(layer, name, result),
    )
    with torch.no_grad(), reader:
        transformer(**arguments)
