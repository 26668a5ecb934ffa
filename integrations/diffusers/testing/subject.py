"""The backbone under test: one random forward, and ways to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.captures import Capture, capture
from corrdit.integrations.diffusers.processors import Operation

MASKED_TEXT_TOKENS = 3


class Skipped(Exception):
    """Raised by a check that cannot be made of this model or here, with the reason."""


@dataclass(frozen=True)
class LayerRead:
    """Copies of what an operation was given: q, k `[B, H, N, D]`, the grid, and the key mask `[B, N]` or None."""

    q: torch.Tensor
    k: torch.Tensor
    grid: TokenGrid
    key_mask: torch.Tensor | None


class AttentionRecorder(TorchFunctionMode):
    """Keeps values and outputs of the attention calls of some modules, as the model itself makes them.

    Args:
        modules: self-attention modules; calls made outside them are left alone.

    Attributes:
        records: for each module, copies of (value, output) of its calls of scaled_dot_product_attention.
    """

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        super().__init__()
        self.records: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in modules]
        self._modules = modules
        self._running: int | None = None
        self._hooks = ExitStack()

    def __enter__(self) -> AttentionRecorder:
        for index, module in enumerate(self._modules):
            entering = module.register_forward_pre_hook(lambda *_, index=index: setattr(self, "_running", index))
            leaving = module.register_forward_hook(lambda *_: setattr(self, "_running", None))
            self._hooks.callback(entering.remove)
            self._hooks.callback(leaving.remove)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()
        super().__exit__(kind, error, trace)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._running is not None:
            value = kwargs["value"] if "value" in kwargs else args[2]
            self.records[self._running].append((value.detach().clone(), output.detach().clone()))
        return output


@dataclass
class Subject:
    """A backbone with random latents and a random prompt, partly masked where the family has a prompt mask.

    Args:
        backbone: under test, in evaluation mode.
        latents: `[B, F, C, h, w]` as `Backbone.forward` takes them.
        text: the transformer's text arguments by name, for the whole batch.
        timestep: of the forward.
        model: runs in place of the backbone's transformer; None for that one.
    """

    backbone: Backbone
    latents: torch.Tensor
    text: dict[str, torch.Tensor]
    timestep: float
    model: torch.nn.Module | None = None
    layers: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = tuple(range(self.backbone.layers))

    @classmethod
    def random(cls, backbone: Backbone, *, frames: int, batch: int, seed: int) -> Subject:
        """Random latents of `frames` frames with four rows and five columns of tokens."""
        source = torch.Generator().manual_seed(seed)
        layout = backbone.layout()
        _, patch_h, patch_w = layout.patch_size(backbone.transformer)
        rows, columns = fitting_tokens(backbone, 4, 5)
        channels = backbone.latent_channels * backbone.frames_per_token
        shape = (batch, frames, channels, rows * patch_h, columns * patch_w)
        text = {}
        for name, blank in backbone.blank_prompt().items():
            if "attention_mask" in name:
                value = torch.ones_like(blank).expand(batch, -1).clone()
                value[1:, -MASKED_TEXT_TOKENS:] = 0
            else:
                value = torch.randn(batch, *blank.shape[1:], generator=source).to(blank)
            text[name] = value
        latents = torch.randn(shape, generator=source).to(device=backbone.device, dtype=backbone.dtype)
        return cls(backbone, latents, text, backbone.timestep(backbone.preset.reading.inference_steps // 2))

    def sizes(self) -> list[Subject]:
        """The subject, and two of other lengths and sizes unless the model has learned positions of one size."""
        if getattr(self.backbone.config, "use_learned_positional_embeddings", False):
            return [self]
        _, patch_h, patch_w = self.backbone.layout().patch_size(self.transformer)
        # One frame more with a row less, and one frame less with a column less; what there is more is seen already.
        longer = torch.cat([self.latents, self.latents[:, :1]], dim=1)[..., :-patch_h, :]
        shorter = self.latents[:, :-1, ..., :-patch_w]
        return [self, *(replace(self, latents=latents) for latents in (longer, shorter) if latents.numel())]

    @property
    def transformer(self) -> torch.nn.Module:
        """The transformer that runs at the subject's timestep."""
        return self.backbone.transformer_at(self.timestep) if self.model is None else self.model

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Its self-attention modules."""
        return self.backbone.layout().attention_modules(self.transformer)

    def arguments(
        self, latents: torch.Tensor | None = None, text: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, Any]:
        """The transformer's arguments for (other) latents and text."""
        chosen = self.latents if latents is None else latents
        batch, frames, _, height, width = chosen.shape
        joined = self.backbone.frames_per_token
        split = chosen.reshape(batch, frames * joined, self.backbone.latent_channels, height, width)
        return self.backbone.call_arguments(split, self.timestep, text or self.text)

    def run(self, latents: torch.Tensor | None = None, text: Mapping[str, torch.Tensor] | None = None) -> None:
        """One forward with (other) latents and text."""
        self.transformer(**self.arguments(latents, text))

    @torch.no_grad()
    def prediction(self) -> torch.Tensor:
        """The transformer's output."""
        return self.transformer(**self.arguments())[0]

    def captured(self, operation: Operation | None = None, **options: Any) -> Capture:
        """A capture of every layer by `small_scalar`, unless another operation or other layers are given."""
        return capture(self.transformer, **{"layers": self.layers, "operation": operation or small_scalar, **options})

    @torch.no_grad()
    def read(
        self,
        layers: tuple[int, ...] | None = None,
        *,
        latents: torch.Tensor | None = None,
        text: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> dict[int, LayerRead]:
        """Copies of queries and keys of layers, from one captured forward with other latents or text.

        Further options are those of `capture`.
        """
        with self.captured(copy_of_inputs, layers=layers or self.layers, **options) as captured:
            self.run(latents, text)
        return {layer: captured[0, layer] for layer in layers or self.layers}


def copy_of_inputs(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> LayerRead:
    """An operation that keeps copies of everything it is given."""
    return LayerRead(q.clone(), k.clone(), grid, None if key_mask is None else key_mask.clone())


def small_scalar(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
    """An operation with a gradient in every query and key."""
    return (q.float() * k.float()).sin().sum() / math.sqrt(q.numel())


def fitting_tokens(backbone: Backbone, rows: int, columns: int) -> tuple[int, int]:
    """At most this many rows and columns of tokens, within what the model has positions for."""
    height, width = (backbone.config.get(name) for name in ("sample_height", "sample_width"))
    _, patch_h, patch_w = backbone.layout().patch_size(backbone.transformer)
    return min(rows, height // patch_h if height else rows), min(columns, width // patch_w if width else columns)


Check = Callable[[Subject], None]
