"""Finding the diffusers pipeline or transformer that a LightningModule holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, cast

import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import Pipeline, layout_of

VideoModel: TypeAlias = Pipeline | torch.nn.Module
"""A diffusers video pipeline, or a bare transformer."""
USUAL_NAME = "transformer"


def find_video_model(module: torch.nn.Module, attribute: str | None = None) -> VideoModel:
    """The pipeline or transformer to read: as `find_held_model`, and of a backbone its pipeline."""
    held = find_held_model(module, attribute)
    return held.pipe if isinstance(held, Backbone) else held


def find_held_model(module: torch.nn.Module, attribute: str | None = None) -> VideoModel | Backbone:
    """The video model that a module holds.

    A pipeline is preferred to a transformer. Of several transformers the one called `transformer` is taken.

    Args:
        module: a LightningModule; it and its submodules are searched for pipelines (attributes, and entries of lists
            and dicts) and for transformers.
        attribute: dotted name to take instead of searching, such as "pipe", "model.transformer" or "pipes.0".

    Returns:
        A diffusers pipeline, the backbone that holds it, or a bare transformer.

    Raises:
        ValueError: nothing known, with what was found; several that cannot be told apart; a wrong `attribute`.
    """
    if attribute is not None:
        return _named(module, attribute)
    found = _pipelines_in(module) or {
        name: child for name, child in module.named_modules(remove_duplicate=False) if name and _is_known(child)
    }
    if len({id(model.pipe if isinstance(model, Backbone) else model) for model in found.values()}) == 1:
        return next((model for model in found.values() if isinstance(model, Backbone)), next(iter(found.values())))
    usual = found.get(USUAL_NAME)
    if isinstance(usual, torch.nn.Module):
        return usual
    if found:
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in found.items())
        raise ValueError(
            f"{type(module).__name__} holds several video models: {kinds}; say which by attribute={next(iter(found))!r}"
        )
    raise ValueError(
        f"{type(module).__name__} holds no diffusers video pipeline and no transformer that is known; found "
        f"{_inventory(module)}. Give attribute= with its dotted name if it is elsewhere"
    )


def _named(module: torch.nn.Module, attribute: str) -> VideoModel | Backbone:
    value: object = module
    try:
        for name in attribute.split("."):
            if isinstance(value, Mapping):
                value = value[name]
            elif isinstance(value, (list, tuple)) and name.isdigit():
                value = value[int(name)]
            else:
                value = getattr(value, name)
    except (AttributeError, IndexError, KeyError):
        raise ValueError(
            f"{type(module).__name__} has no attribute {attribute!r}; it holds {_inventory(module)}"
        ) from None
    pipe = _pipeline_of(value)
    if pipe is not None:
        return pipe
    if not isinstance(value, torch.nn.Module):
        raise ValueError(f"{attribute} is a {type(value).__name__}, no diffusers video pipeline or transformer")
    layout_of(value)
    return value


def _pipelines_in(module: torch.nn.Module) -> dict[str, VideoModel | Backbone]:
    """Pipelines, and backbones that hold one, by dotted name."""
    found: dict[str, VideoModel | Backbone] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        for name, value in vars(child).items():
            entries = {name: value}
            if isinstance(value, (list, tuple)):
                entries = {f"{name}.{index}": entry for index, entry in enumerate(value)}
            elif isinstance(value, dict):
                entries = {f"{name}.{key}": entry for key, entry in value.items()}
            pipelines = {place: _pipeline_of(entry) for place, entry in entries.items()}
            found |= {f"{prefix}.{place}".lstrip("."): pipe for place, pipe in pipelines.items() if pipe is not None}
    return found


def _pipeline_of(value: object) -> Pipeline | Backbone | None:
    """`value` if it is a pipeline or a backbone, or the pipeline that it holds as `pipe`; None otherwise."""
    if isinstance(value, Backbone):
        return value
    if isinstance(value, torch.nn.Module):
        return None
    for candidate in (value, getattr(value, "pipe", None)):
        transformer = getattr(candidate, "transformer", None)
        if isinstance(transformer, torch.nn.Module) and hasattr(candidate, "scheduler") and _is_known(transformer):
            return cast(Pipeline, candidate)
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
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    held = {name: value for name, value in attributes.items() if not isinstance(value, ordinary)}
    held = dict(module.named_children()) | held
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in held.items()) or "nothing"
