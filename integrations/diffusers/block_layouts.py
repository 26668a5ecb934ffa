"""What a layout says of a family of transformers, and the layout of those that are built as diffusers builds most."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, cast

import torch
from torch import nn

from corrdit.grid import TokenGrid

Arguments: TypeAlias = dict[str, Any]
"""What a transformer is given, by name."""
Text: TypeAlias = Mapping[str, torch.Tensor]
"""Those of them that stand for the prompt."""


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
        transformers: names of the classes it is the layout of.
        text: where the text stands in the token axis of self-attention; None where it does not.
        axes: of the latents a call is given, in their order: batch, channels, frames, height and width.
        compared_calls: whether what its pipelines predict is one sum of differences, so that a shift of every
            prediction of a step, in whatever number of calls, shifts the result by the same.
        rotary_halves: in how many parts of a head's channels rotary embedding pairs the two halves of the part; 0
            where it pairs neighbours.
    """

    guidance: ClassVar[Literal["batched", "separate"]]
    family: ClassVar[str] = ""
    transformers: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[Literal["first", "last"] | None] = None
    axes: ClassVar[str] = "BCFHW"
    compared_calls: ClassVar[bool] = False
    rotary_halves: ClassVar[int] = 0

    @abc.abstractmethod
    def attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        """The self-attention modules in the order they run; layer n of a capture is the n-th of them."""

    @abc.abstractmethod
    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        """Batch, token grid and timestep of a forward, from its arguments by name."""

    def cross_attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        """The modules by which the video attends to the text, one beside each of `attention_modules`.

        Raises:
            ValueError: a family whose layout does not say where they are.
        """
        raise ValueError(
            f"where {type(transformer).__name__} attends to its text is not known; give its layout "
            "cross_attention_modules"
        )

    def refusal(self, transformer: nn.Module) -> str | None:
        """Why a model of the family has no softmax map from frame to frame, by its config; None where it has."""
        return None

    def block_lists(self, transformer: nn.Module) -> list[str]:
        """Names of the module lists that hold the blocks, in the order they run."""
        return ["transformer_blocks"]

    def heads(self, transformer: nn.Module) -> int:
        """Attention heads."""
        return int(config_of(transformer).num_attention_heads)

    def head_width(self, transformer: nn.Module) -> int:
        """Channels of a head."""
        return int(config_of(transformer).attention_head_dim)

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

    def text_tokens(self, arguments: Arguments) -> int:
        """Text tokens a call puts into the token axis of self-attention, of a family that has them there."""
        return int(arguments["encoder_hidden_states"].shape[1])

    def text_mask(self, arguments: Arguments) -> torch.Tensor | None:
        """Which of those take part, bool `[B, T]`; None for all."""
        mask: torch.Tensor | None = arguments.get("encoder_attention_mask")
        return None if mask is None else mask.bool()

    @abc.abstractmethod
    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        """(frames, rows, columns) of latents that one token stands for."""


class BlockLayout(TransformerLayout):
    """A transformer as diffusers builds most: one attention module a block.

    Attributes:
        lists: names of the module lists that hold the blocks, in the order they run.
        attention: name of the attention module in a block, or its path there.
        cross: likewise of the module in a block that attends to the text, where that is apart.
    """

    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    attention: ClassVar[str] = "attn1"
    cross: ClassVar[str] = "attn2"

    def attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        return self._in_blocks(transformer, self.attention)

    def cross_attention_modules(self, transformer: nn.Module) -> list[nn.Module]:
        return self._in_blocks(transformer, self.cross)

    def _in_blocks(self, transformer: nn.Module, path: str) -> list[nn.Module]:
        return [block.get_submodule(path) for name in self.lists for block in getattr(transformer, name)]

    def block_lists(self, transformer: nn.Module) -> list[str]:
        return list(self.lists)

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        config = config_of(transformer)
        if isinstance(config.patch_size, int):
            return (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)
        frames, rows, columns = config.patch_size
        return (frames, rows, columns)

    def read_call(self, transformer: nn.Module, arguments: Arguments) -> ForwardCall:
        grid = self.video_grid(transformer, *self.latent_size(arguments))
        if self.text is not None:
            grid = self.with_text(grid, self.text_tokens(arguments))
        return ForwardCall(batch=len(arguments["hidden_states"]), grid=grid, timestep=arguments["timestep"])

    def latent_size(self, arguments: Arguments) -> tuple[int, int, int]:
        """(frames, height, width) of the latents of a call."""
        shape = arguments["hidden_states"].shape
        frames, height, width = (shape[self.axes.index(axis)] for axis in "FHW")
        return frames, height, width
