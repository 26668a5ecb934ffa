"""Which layout a transformer has: what the capture has to know about a family of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import nn

from corrdit.integrations.diffusers.block_layouts import (
    Arguments,
    BlockLayout,
    Config,
    ForwardCall,
    Pipeline,
    Text,
    TransformerLayout,
    config_of,
)
from corrdit.integrations.diffusers.family_layouts import FAMILY_LAYOUTS, REFUSED_TRANSFORMERS

__all__ = [
    "FAMILY_LAYOUTS",
    "REFUSED_TRANSFORMERS",
    "Arguments",
    "BlockLayout",
    "Config",
    "ForwardCall",
    "Pipeline",
    "Text",
    "TransformerLayout",
    "config_of",
    "forward_arguments",
    "has_layout",
    "layout_of",
    "register_layout",
]

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
        if candidate.__name__ in _registered:
            layout = _registered[candidate.__name__]()
            reason = layout.refusal(transformer)
        else:
            layout, reason = None, REFUSED_TRANSFORMERS.get(candidate.__name__)
        if reason is not None:
            raise ValueError(
                f"{candidate.__name__} is not supported: {reason}, so there is no plain softmax map from frame to "
                "frame to read; if that is not so for this model, register a layout with "
                "corrdit.integrations.diffusers.register_layout"
            )
        if layout is not None:
            return layout
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
