"""What the capture has to know about a family of transformers: where attention is, and what a forward is given.

One `TransformerLayout` for each family lives beside its backbone; this file finds the one for a model.
"""

from __future__ import annotations

import abc
import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from corrdit.grid import TokenGrid

FAMILY_LAYOUTS = {
    "CogVideoXTransformer3DModel": "corrdit.integrations.diffusers.backbones.cogvideox:CogVideoXLayout",
    "HunyuanVideoTransformer3DModel": "corrdit.integrations.diffusers.backbones.hunyuanvideo:HunyuanVideoLayout",
    "LTXVideoTransformer3DModel": "corrdit.integrations.diffusers.backbones.ltx:LTXLayout",
    "MochiTransformer3DModel": "corrdit.integrations.diffusers.backbones.mochi:MochiLayout",
    "WanTransformer3DModel": "corrdit.integrations.diffusers.backbones.wan:WanLayout",
}
"""Layout class by the transformer's class name."""

REFUSED_TRANSFORMERS = {
    "LatteTransformer3DModel": "it attends within frames and across time in separate layers (factored attention)",
    "SanaVideoTransformer3DModel": "its attention is linear, without a softmax over tokens",
    "Kandinsky5Transformer3DModel": "its sparse attention (NABLA) reorders the tokens",
    "HunyuanVideoFramepackTransformer3DModel": "it prepends a packed history whose tokens are not frames of the video",
    "HeliosTransformer3DModel": "it prepends a history whose tokens are not frames of the video",
    "SkyReelsV2Transformer3DModel": "its attention is block-causal, so a frame does not attend to later ones",
}
"""Reason by class name for video transformers without a plain softmax map from frame to frame."""


@dataclass(frozen=True)
class ForwardCall:
    """One call of a transformer.

    Args:
        batch: samples in the call.
        grid: the token axis of its self-attention.
        timestep: as the model was given it.
    """

    batch: int
    grid: TokenGrid
    timestep: torch.Tensor | float


class TransformerLayout(abc.ABC):
    """Where a family of transformers keeps its self-attention and how it lays out tokens.

    Attributes:
        guidance: "batched" if its pipelines put [unconditional, conditional] into one call, "separate" if they call
            the conditional first and then the unconditional.
    """

    guidance: ClassVar[Literal["batched", "separate"]]

    @abc.abstractmethod
    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        """The self-attention modules in the order they run; layer n of a capture is the n-th of them."""

    @abc.abstractmethod
    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        """Batch, token grid and timestep of a forward, from its arguments by name."""

    def block_lists(self, transformer: torch.nn.Module) -> list[str]:
        """Names of the module lists that hold the blocks, in the order they run."""
        return ["transformer_blocks"]

    def video_grid(self, transformer: torch.nn.Module, frames: int, height: int, width: int) -> TokenGrid:
        """The video tokens of latents of `frames` x `height` x `width`, without text.

        Raises:
            ValueError: a size that is not a multiple of the patch.
        """
        patch_t, patch_h, patch_w = self.patch_size(transformer)
        for name, size, patch in (("frames", frames, patch_t), ("height", height, patch_h), ("width", width, patch_w)):
            if size % patch:
                raise ValueError(
                    f"latent {name} {size} is not a multiple of the patch size {patch} of "
                    f"{type(transformer).__name__}; resize or crop the video"
                )
        return TokenGrid(frames // patch_t, height // patch_h, width // patch_w)

    @abc.abstractmethod
    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        """(frames, rows, columns) of latents that one token stands for."""


def layout_of(transformer: torch.nn.Module) -> TransformerLayout:
    """The layout of a transformer's class or of the nearest base class that has one.

    Raises:
        ValueError: a class that is not known, or one whose attention cannot serve, with the reason.
    """
    if hasattr(transformer, "_orig_mod"):
        raise ValueError(
            "the whole transformer is compiled, so its forwards cannot be told apart; compile its blocks instead "
            "(transformer.compile_repeated_blocks(), or block.compile() for each block)"
        )
    for candidate in type(transformer).__mro__:
        if candidate.__name__ in REFUSED_TRANSFORMERS:
            raise ValueError(
                f"{candidate.__name__} is not supported: {REFUSED_TRANSFORMERS[candidate.__name__]}, so there is no "
                "softmax map from frame to frame to read"
            )
        layout = _registered_layouts().get(candidate.__name__)
        if layout is not None:
            return layout()
    for name, child in transformer.named_modules():
        if name and has_layout(child):
            raise ValueError(
                f"{type(transformer).__name__} is not a known video transformer, but holds a {type(child).__name__} as "
                f".{name}; give that one (calls of the whole are noticed)"
            )
    raise ValueError(
        f"{type(transformer).__name__} is not a known video transformer; known are "
        f"{', '.join(sorted(_registered_layouts()))}; register a layout with "
        "corrdit.integrations.diffusers.register_layout"
    )


def has_layout(transformer: torch.nn.Module) -> bool:
    """Whether `layout_of` knows the class of a transformer, or one of its base classes."""
    return any(candidate.__name__ in _registered_layouts() for candidate in type(transformer).__mro__)


def register_layout(transformer_class_name: str, layout: type[TransformerLayout]) -> None:
    """Make a family known to `capture`, for transformers whose class (or a base class) has this name.

    Raises:
        ValueError: not a subclass of TransformerLayout.
    """
    if not (isinstance(layout, type) and issubclass(layout, TransformerLayout)):
        raise ValueError(f"layout must be a subclass of TransformerLayout, got {layout!r}")
    _THIRD_PARTY_LAYOUTS[transformer_class_name] = layout


def forward_arguments(transformer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the class's own `forward`, whatever hooks wrap it."""
    signature = _forward_signature(type(transformer))  # type: ignore[arg-type]
    arguments = dict(signature.bind(transformer, *args, **kwargs).arguments)
    del arguments[next(iter(arguments))]  # self
    return arguments


@functools.cache
def _forward_signature(transformer_class: type) -> inspect.Signature:
    return inspect.signature(transformer_class.forward)  # type: ignore[attr-defined]


_THIRD_PARTY_LAYOUTS: dict[str, type[TransformerLayout]] = {}


def _registered_layouts() -> dict[str, Any]:
    loaders = {name: functools.partial(_load, target) for name, target in FAMILY_LAYOUTS.items()}
    return {**loaders, **_THIRD_PARTY_LAYOUTS}


def _load(target: str) -> TransformerLayout:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)()
