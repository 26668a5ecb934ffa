"""Pipelines of diffusers given where a backbone is asked for, to rooms that know nothing of diffusers."""

from __future__ import annotations

from collections.abc import Callable

_makers: list[Callable[[object], object]] = []


def make_backbones_with(maker: Callable[[object], object]) -> None:
    """Says from above, where diffusers is known, how a backbone is made of a pipeline."""
    _makers[:] = [maker]


def backbone_of_pipeline(given: object) -> object:
    """The backbone round a pipeline; anything else, which a backbone may be, as it is."""
    if isinstance(given, type) or not hasattr(given, "transformer") or hasattr(given, "token_stride"):
        return given
    return _makers[0](given)
