"""Ending a transformer's forward after the last layer that is needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from corrdit.integrations.diffusers.compatibility import has_compiled_blocks, is_offloaded
from corrdit.integrations.diffusers.layouts import TransformerLayout
from corrdit.integrations.diffusers.processors import EarlyExit


@contextlib.contextmanager
def leaving_after(transformer: torch.nn.Module, layout: TransformerLayout, layer: int) -> Iterator[bool]:
    """Inside the block, forwards of the transformer end after attention layer `layer`.

    Normally the processor raises `EarlyExit` there, which is caught round the transformer's own forward; the call then
    returns None. Offload hooks would miss the end of their module's forward, and compiled code cannot raise: there
    the blocks behind the layer are left out instead, and the call returns a prediction of no use.

    Yields:
        Whether the processor of the layer is to raise `EarlyExit`.
    """
    if is_offloaded(transformer) or has_compiled_blocks(transformer):
        with _shortened(transformer, layout, layer + 1):
            yield False
        return
    own = transformer.__dict__.get("forward")
    transformer.forward = _returning_early(transformer.forward)
    try:
        yield True
    finally:
        if own is None:
            del transformer.__dict__["forward"]
        else:
            transformer.forward = own


def _returning_early(forward: Any) -> Any:
    @functools.wraps(forward)
    def forward_until_read(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except EarlyExit:
            return None

    return forward_until_read


@contextlib.contextmanager
def _shortened(transformer: torch.nn.Module, layout: TransformerLayout, blocks: int) -> Iterator[None]:
    originals = {name: transformer.get_submodule(name) for name in layout.block_lists(transformer)}
    remaining = blocks
    try:
        for name, original in originals.items():
            kept = list(original.children())[:remaining]
            remaining -= len(kept)
            setattr(transformer, name, torch.nn.ModuleList(kept))
        yield
    finally:
        for name, original in originals.items():
            setattr(transformer, name, original)
