"""Finding the diffusers pipeline or transformer that a LightningModule holds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.layouts import layout_of

USUAL_NAME = "transformer"


def find_video_model(module: torch.nn.Module, attribute: str | None = None) -> Any:
    """The pipeline or transformer to read.

    A pipeline is preferred to a transformer. Of several transformers the one called `transformer` is taken.

    Args:
        module: a LightningModule; it and its submodules are searched for pipelines (attributes, and entries of lists
            and dicts) and for transformers.
        attribute: dotted name to take instead of searching, such as "pipe", "model.transformer" or "pipes.0".

    Returns:
        A diffusers pipeline or a bare transformer.

    Raises:
        ValueError: nothing known, with what was found; several that cannot be told apart; a wrong `attribute`.
    """
    if attribute is not None:
        return _named(module, attribute)
    pipelines = _pipelines_in(module)
    if len({id(pipe) for pipe in pipelines.values()}) == 1:
        return next(iter(pipelines.values()))
    children = module.named_modules(remove_duplicate=False)
    transformers = {name: child for name, child in children if name and _is_known(child)}
    if not pipelines and len({id(transformer) for transformer in transformers.values()}) == 1:
        return next(iter(transformers.values()))
    if not pipelines and USUAL_NAME in transformers:
        return transformers[USUAL_NAME]
    found = pipelines or transformers
    if found:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in found.items())
        raise ValueError(
            f"{type(module).__name__} holds several video models: {kinds}; say which by attribute={next(iter(found))!r}"
        )
    raise ValueError(
        f"{type(module).__name__} holds no diffusers video pipeline and no transformer that is known; found "
        f"{_inventory(module)}. Give attribute= with its dotted name if it is elsewhere"
    )


def transformer_of(model: Any) -> torch.nn.Module:
    """The first transformer of a pipeline, or the transformer itself."""
    return transformers_of(model)[0]


def layer_count(model: Any) -> int:
    """Attention layers, over all blocks."""
    transformer = transformer_of(model)
    return len(layout_of(transformer).attention_modules(transformer))


def _named(module: torch.nn.Module, attribute: str) -> Any:
    try:
        value = functools.reduce(_entry, attribute.split("."), module)
    except (AttributeError, IndexError, KeyError):
        raise ValueError(
            f"{type(module).__name__} has no attribute {attribute!r}; it holds {_inventory(module)}"
        ) from None
    pipe = _pipeline_of(value)
    if pipe is None:
        if not isinstance(value, torch.nn.Module):
            raise ValueError(f"{attribute} is a {type(value).__name__}, no diffusers video pipeline or transformer")
        layout_of(value)
    return value if pipe is None else pipe


def _entry(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value[name]
    if isinstance(value, (list, tuple)) and name.isdigit():
        return value[int(name)]
    return getattr(value, name)


def _pipelines_in(module: torch.nn.Module) -> dict[str, Any]:
    """Pipelines by dotted name."""
    found = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, value in vars(child).items():
            entries = {name: value}
            if isinstance(value, (list, tuple)):
                entries = {f"{name}.{index}": entry for index, entry in enumerate(value)}
            elif isinstance(value, dict):
                entries = {f"{name}.{key}": entry for key, entry in value.items()}
            for place, entry in entries.items():
                pipe = _pipeline_of(entry)
                if pipe is not None:
                    found[f"{prefix}.{place}" if prefix else place] = pipe
    return found


def _plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _pipeline_of(value: Any) -> Any:
    """The pipeline that `value` is or, being a backbone, holds; None otherwise."""
    if isinstance(value, torch.nn.Module):
        return None
    for candidate in (value, getattr(value, "pipe", None)):
        transformer = getattr(candidate, "transformer", None)
        if isinstance(transformer, torch.nn.Module) and hasattr(candidate, "scheduler") and _is_known(transformer):
            return candidate
    return None


def _is_known(module: torch.nn.Module) -> bool:
    try:
        layout_of(module)
    except ValueError:
        return False
    return True


def _inventory(module: torch.nn.Module) -> str:
    """Names and classes of what a module holds."""
    ordinary = (str, bytes, int, float, bool, type(None), list, tuple, dict, set, torch.Tensor)
    held = {name: child for name, child in module.named_children()}
    held |= {name: value for name, value in _plain_attributes(module).items() if not isinstance(value, ordinary)}
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in held.items()) or "nothing"
