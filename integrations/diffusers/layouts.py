"""What the capture has to know about a family of transformers: where attention is, and what a forward is given.

The layouts of the families in diffusers stand here, without anything else of a model, so that a capture of a pipeline
loads no backbone. `backbones/table.py` has the models that can be read by themselves.
"""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast

import torch
from torch import nn

from corrdit.grid import TokenGrid

REFUSED_TRANSFORMERS = {
    "LatteTransformer3DModel": "it attends within frames and across time in separate layers (factored attention)",
    "SanaVideoTransformer3DModel": "its attention is linear, without a softmax over tokens",
    "Kandinsky5Transformer3DModel": "its sparse attention (NABLA) reorders the tokens",
    "HunyuanVideoFramepackTransformer3DModel": "it prepends a packed history whose tokens are not frames of the video",
    "HeliosTransformer3DModel": "it prepends a history whose tokens are not frames of the video",
    "SkyReelsV2Transformer3DModel": "its attention is block-causal, so a frame does not attend to later ones",
}
"""Reason by class name for video transformers without a plain softmax map from frame to frame."""


Arguments: TypeAlias = dict[str, Any]
"""What a transformer is given, by name."""


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
        family: name under which settings of its models are published.
        text: where the text stands in the token axis of self-attention; None where it does not.
    """

    guidance: ClassVar[Literal["batched", "separate"]]
    family: ClassVar[str] = ""
    text: ClassVar[Literal["first", "last"] | None] = None

    @abc.abstractmethod
    def attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        """The self-attention modules in the order they run; layer n of a capture is the n-th of them."""

    @abc.abstractmethod
    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        """Batch, token grid and timestep of a forward, from its arguments by name."""

    def block_lists(self, transformer: nn.Module) -> list[str]:
        """Names of the module lists that hold the blocks, in the order they run."""
        return ["transformer_blocks"]

    def video_grid(self, transformer: nn.Module, frames: int, height: int, width: int) -> TokenGrid:
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

    def with_text(self, video: TokenGrid, tokens: int) -> TokenGrid:
        """The grid with so many text tokens where this family puts them, if it does."""
        return video if self.text is None else replace(video, text_tokens=tokens, text_first=self.text == "first")

    @abc.abstractmethod
    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        """(frames, rows, columns) of latents that one token stands for."""


class Config(Protocol):
    """Options a part of a pipeline was built with, by name; which there are is the family's own."""

    def __getattr__(self, name: str) -> Any: ...


def config_of(part: nn.Module) -> Config:
    """The config that every model of diffusers carries."""
    return cast(Config, part.config)


class Pipeline(Protocol):
    """What a backbone asks of a pipeline of diffusers; what else there is, is the family's own."""

    transformer: nn.Module
    scheduler: Any

    @property
    def _execution_device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any: ...


class BlockLayout(TransformerLayout):
    """A transformer as diffusers builds most: one attention module a block, latents `[B, C, F, h, w]`.

    Attributes:
        lists: names of the module lists that hold the blocks, in the order they run.
        attention: name of the attention module in a block.
    """

    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attention: ClassVar[str] = "attn1"

    def attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        return [getattr(block, self.attention) for name in self.lists for block in getattr(transformer, name)]

    def block_lists(self, transformer: nn.Module) -> list[str]:
        return list(self.lists)

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        config = config_of(transformer)
        return (config.patch_size_t or 1, config.patch_size, config.patch_size)

    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        grid = self.video_grid(transformer, *self.latent_size(arguments))
        if self.text is not None:
            grid = self.with_text(grid, arguments["encoder_hidden_states"].shape[1])
        return ForwardCall(batch=len(arguments["hidden_states"]), grid=grid, timestep=arguments["timestep"])

    def latent_size(self, arguments: Arguments) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a call."""
        _, _, frames, height, width = arguments["hidden_states"].shape
        return frames, height, width


class CogVideoXLayout(BlockLayout):
    """Where CogVideoX keeps its attention, and its token axis: text, then frames."""

    family = "cogvideox"
    guidance = "batched"
    text = "first"

    def latent_size(self, arguments: Arguments) -> tuple[int, int, int]:
        _, frames, _, height, width = arguments["hidden_states"].shape
        return frames, height, width


class HunyuanVideoLayout(BlockLayout):
    """Where HunyuanVideo keeps its attention, and its token axis: frames, then text."""

    family = "hunyuanvideo"
    guidance = "separate"
    lists = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    text = "last"


class LTXLayout(BlockLayout):
    """Where LTX keeps its attention, and its token axis: frames alone. It is given tokens `[B, F * h * w, C]`."""

    family = "ltx"
    guidance = "batched"

    def latent_size(self, arguments: Arguments) -> tuple[int, int, int]:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            raise ValueError(
                "this forward of LTX gives coordinates instead of num_frames, height and width (conditioning on images "
                "or videos adds tokens), so its tokens are not a grid of frames; use the text-to-video pipeline"
            )
        return frames, height, width


class MochiLayout(BlockLayout):
    """Where Mochi keeps its attention, and its token axis: frames, then text."""

    family = "mochi"
    guidance = "batched"
    text = "last"

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        size = config_of(transformer).patch_size
        return (1, size, size)


class WanLayout(BlockLayout):
    """Where Wan keeps its attention, and its token axis: frames alone."""

    family = "wan"
    guidance = "separate"
    lists = ("blocks",)

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        frames, rows, columns = config_of(transformer).patch_size
        return (frames, rows, columns)


FAMILY_LAYOUTS: dict[str, type[TransformerLayout]] = {
    "CogVideoXTransformer3DModel": CogVideoXLayout,
    "HunyuanVideoTransformer3DModel": HunyuanVideoLayout,
    "LTXVideoTransformer3DModel": LTXLayout,
    "MochiTransformer3DModel": MochiLayout,
    "WanTransformer3DModel": WanLayout,
}
"""Layout by the transformer's class name."""

_registered = dict(FAMILY_LAYOUTS)
"""Those of other packages too."""


def layout_of(transformer: nn.Module) -> TransformerLayout:
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
        if candidate.__name__ in _registered:
            return _registered[candidate.__name__]()
    for name, child in transformer.named_modules():
        if name and has_layout(child):
            raise ValueError(
                f"{type(transformer).__name__} is not a known video transformer, but holds a {type(child).__name__} as "
                f".{name}; give that one (calls of the whole are noticed)"
            )
    raise ValueError(
        f"{type(transformer).__name__} is not a known video transformer; known are "
        f"{', '.join(sorted(_registered))}; register a layout with "
        "corrdit.integrations.diffusers.register_layout"
    )


def has_layout(transformer: nn.Module) -> bool:
    """Whether `layout_of` knows the class of a transformer, or one of its base classes."""
    return any(candidate.__name__ in _registered for candidate in type(transformer).__mro__)


def register_layout(transformer_class_name: str, layout: type[TransformerLayout]) -> None:
    """Make a family known to `capture`, for transformers whose class (or a base class) has this name.

    Raises:
        ValueError: not a subclass of TransformerLayout.
    """
    if not (isinstance(layout, type) and issubclass(layout, TransformerLayout)):
        raise ValueError(f"layout must be a subclass of TransformerLayout, got {layout!r}")
    _registered[transformer_class_name] = layout


def forward_arguments(transformer: nn.Module, args: tuple[object, ...], kwargs: Arguments) -> Arguments:
    """The arguments of a call by the names of the class's own `forward`, whatever hooks wrap it."""
    arguments = dict(_signature(type(transformer).forward).bind(transformer, *args, **kwargs).arguments)
    del arguments[next(iter(arguments))]  # self
    return arguments


@functools.cache
def _signature(forward: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(forward)
