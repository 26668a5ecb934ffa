"""Changing queries, keys and values between the stock processor's projections and its attention.

As `CorrespondenceProcessor` reads them, so `EditingProcessor` writes them: the inner processor runs unchanged under a
local `TorchFunctionMode` that sees its call of `scaled_dot_product_attention`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.compatibility import check_processor
from corrdit.integrations.diffusers.processors import SCALED_DOT_PRODUCT_ATTENTION

Edit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`edit(q, k, v)`, each `[B, H, N, D]` as the attention gets them; new tensors, nothing written in place."""

ROTARY_ARGUMENTS = ("image_rotary_emb", "rotary_emb")
"""What processors call the rotary tables they are given."""


class EditingProcessor:
    """Drop-in attention processor that lets `edit` change what the attention is computed from.

    Args:
        inner: the processor it delegates to.
        edit: changes queries, keys and values.
        rotary: `rotary(tables)` is shown the rotary tables the inner processor is given, which it then does not
            get: `edit` has to apply them. None leaves them to the inner processor.
    """

    def __new__(cls, inner: Any, *args: Any, **kwargs: Any) -> EditingProcessor:
        return super().__new__(_with_argument_names(cls, type(inner)))  # type: ignore[arg-type]

    def __init__(self, inner: Any, edit: Edit | None, *, rotary: Callable[[Any], None] | None = None) -> None:
        check_processor(inner)
        self.inner = inner
        self._edit = edit
        self._rotary = rotary

    def run(self, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The inner processor's output, from edited queries, keys and values."""
        if self._rotary is not None:
            signature = _signature(type(self.inner))  # type: ignore[arg-type]
            bound = signature.bind(self.inner, attn, *args, **kwargs)
            name = next((name for name in ROTARY_ARGUMENTS if bound.arguments.get(name) is not None), None)
            if name is not None:
                self._rotary(bound.arguments[name])
                bound.arguments[name] = None
            args, kwargs = bound.args[2:], bound.kwargs
        if self._edit is None:
            return self.inner(attn, *args, **kwargs)
        with _AttentionEditor(self._edit):
            return self.inner(attn, *args, **kwargs)

    @property
    def _attention_backend(self) -> Any:
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config

    def __reduce__(self) -> tuple[Any, ...]:
        return (_itself, (self.inner,))


@contextlib.contextmanager
def processors_wrapped(
    modules: Mapping[int, torch.nn.Module], wrap: Callable[[int, Any], EditingProcessor]
) -> Iterator[None]:
    """Processors of attention modules, by layer, replaced by `wrap(layer, processor)` inside the block."""
    wrapped: list[tuple[torch.nn.Module, EditingProcessor]] = []
    try:
        for layer, module in modules.items():
            processor = wrap(layer, module.processor)
            module.processor = processor  # type: ignore[assignment]
            wrapped.append((module, processor))
        yield
    finally:
        for module, processor in reversed(wrapped):
            if module.processor is processor:
                module.processor = processor.inner


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


class _AttentionEditor(TorchFunctionMode):
    """Passes every scaled_dot_product_attention on with edited queries, keys and values."""

    def __init__(self, edit: Edit) -> None:
        super().__init__()
        self.edit = edit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not SCALED_DOT_PRODUCT_ATTENTION:
            return func(*args, **kwargs)
        inputs = [args[index] if len(args) > index else kwargs.pop(name) for index, name in enumerate(_INPUTS)]
        return func(*self.edit(*inputs), *args[3:], **kwargs)


_INPUTS = ("query", "key", "value")


@functools.cache
def _with_argument_names(base: type[EditingProcessor], inner: type) -> type[EditingProcessor]:
    """`base` with the argument names of `inner.__call__`: attention modules pass on no others."""

    def __call__(self: EditingProcessor, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, *args, **kwargs)

    __call__.__signature__ = _signature(inner)  # type: ignore[attr-defined]
    return type(base.__name__, (base,), {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__})


@functools.cache
def _signature(processor_class: type) -> inspect.Signature:
    return inspect.signature(processor_class.__call__)


def _itself(inner: Any) -> Any:
    return inner
