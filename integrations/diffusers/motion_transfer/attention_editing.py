"""Changing queries, keys and values between the stock processor's projections and its attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.compatibility import check_processor
from corrdit.integrations.diffusers.host.attention import DelegatingProcessor, Interceptor, Interceptors

ROTARY_ARGUMENTS = ("image_rotary_emb", "rotary_emb")
"""What processors call the rotary tables they are given."""


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
        self._rotary_position = None if rotary is None else _rotary_position(type(inner))

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output, from edited queries, keys and values."""
        if self._rotary is not None and self._rotary_position is not None:
            name, position = self._rotary_position
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


def _rotary_position(processor_class: type) -> tuple[str, int] | None:
    """Name and position, behind the attention module, of the rotary tables among a processor's arguments."""
    names = list(inspect.signature(processor_class.__call__).parameters)  # type: ignore[operator]
    return next(((name, names.index(name) - 2) for name in ROTARY_ARGUMENTS if name in names), None)
