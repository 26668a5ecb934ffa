"""Where correspondence is read from each model: published settings, and a starting point for models without any."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

CALIBRATED = "calibrated: "
"""How the source of settings begins that `corrdit calibrate` chose."""

PUBLISHED_LAYER_SHARE = 17 / 30
"""Depth of the published layer in CogVideoX-2B; the starting point for models nobody has published a layer for."""


@dataclass(frozen=True)
class Preset:
    """Settings for reading correspondence from a model.

    Args:
        layer: attention layer, counted over all blocks.
        step: denoising step; -1 is the last of `inference_steps`.
        inference_steps: length of the schedule `step` counts in.
        heads: how heads are combined: "logits", "features", "probabilities" or "none".
        head_weights: weight of each head, or None for equal weights.
        head: a single head to use, or None.
        noise: whether latents are noised to the step's timestep before they are read.
        frames_per_chunk: latent frames the model is given at once.
        height: working height in pixels, or None for the video's own.
        width: working width in pixels, or None for the video's own.
        tokens_per_frame: limit of tokens a frame is encoded to where height and width are None.
        guidance_layers: layers for cross-attention guidance, or None for published ones or `layer`.
        tracking: options of `corrdit.PointTracker` in place of its defaults, None for none; they count only where no
            layer is asked for.
        source: where the settings come from.
    """

    layer: int
    step: int = -1
    inference_steps: int = 50
    heads: str = "probabilities"
    head_weights: tuple[float, ...] | None = None
    head: int | None = None
    noise: bool = False
    frames_per_chunk: int = 13
    height: int | None = None
    width: int | None = None
    tokens_per_frame: int | None = None
    guidance_layers: tuple[int, ...] | None = None
    tracking: Mapping[str, Any] | None = None
    source: str = "given"

    @property
    def calibrated(self) -> bool:
        """Whether the settings were chosen by an analysis of this very model."""
        return self.source.startswith(CALIBRATED)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Preset:
        """From a preset.json.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a preset.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(
                f"a preset is a Preset or the path of a preset.json, got {path!r}; see Preset.from_mapping"
            )
        try:
            values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except IsADirectoryError as error:
            raise ValueError(f"{os.fspath(path)} is a folder; give the preset.json in it") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no preset file {os.fspath(path)}; `corrdit calibrate` writes one"
            ) from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a preset as `corrdit calibrate` writes it: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{os.fspath(path)} is not a preset; it holds a {type(values).__name__}")
        try:
            return cls.from_mapping(values)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a preset that can be used: {error}") from error

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Preset:
        """From a preset.json; entries this version does not know are left alone.

        Raises:
            ValueError: no layer in it, or an entry of another type or out of range.
        """
        known = {field.name for field in fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known}
        if "layer" not in chosen:
            raise ValueError(f"a preset needs a layer; it holds {', '.join(values) or 'nothing'}")
        for name, value in chosen.items():
            problem = _problem(name, value)
            if problem is not None:
                raise ValueError(f"{name} must be {problem}, got {value!r}")
        for name in ("head_weights", "guidance_layers"):
            if chosen.get(name) is not None:
                chosen[name] = tuple(chosen[name])
        return cls(**chosen)


def _is_number(value: object, kind: type | tuple[type, ...] = int) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


_HEADS = ("probabilities", "logits", "features", "none")
_REQUIRED = ("layer", "step", "inference_steps", "heads", "noise", "frames_per_chunk", "source")
_LEAST = {"head": 0, "inference_steps": 1, "frames_per_chunk": 2, "height": 1, "width": 1, "tokens_per_frame": 1}


def _problem(name: str, value: Any) -> str | None:
    """What an entry of a preset has to be, where it is not."""
    if value is None:
        return "given" if name in _REQUIRED else None
    if name in ("layer", "step"):
        return None if _is_number(value) else "a whole number"
    if name in _LEAST:
        return None if _is_number(value) and value >= _LEAST[name] else f"a whole number of at least {_LEAST[name]}"
    if name == "heads":
        return None if value in _HEADS else f"one of {', '.join(_HEADS)}"
    if name == "noise":
        return None if isinstance(value, bool) else "true or false"
    if name in ("head_weights", "guidance_layers"):
        kind, text = ((int, float), "numbers") if name == "head_weights" else ((int,), "whole numbers")
        good = isinstance(value, (list, tuple)) and value and all(_is_number(entry, kind) for entry in value)
        return None if good else f"a list of {text}"
    if name == "tracking":
        return None if isinstance(value, Mapping) else "options of the tracker by name"
    return None if isinstance(value, str) else "a text"


@dataclass(frozen=True)
class PublishedModel:
    """A model with published settings.

    Args:
        hub_id: repository of the weights.
        family: family of the transformer.
        layers: attention layers.
        heads: attention heads.
        dtype: precision of the published results.
        preset: the settings.
    """

    hub_id: str
    family: str
    layers: int
    heads: int
    dtype: str
    preset: Preset


_DIFFTRACK = "DiffTrack's released tracking"
PUBLISHED_MODELS = {
    "cogvideox-2b": PublishedModel(
        "THUDM/CogVideoX-2b", "cogvideox", 30, 30, "float16", Preset(17, height=480, width=720, source=_DIFFTRACK)
    ),
    "cogvideox-5b": PublishedModel(
        "THUDM/CogVideoX-5b", "cogvideox", 42, 48, "bfloat16", Preset(17, height=480, width=720, source=_DIFFTRACK)
    ),
    "hunyuanvideo": PublishedModel(
        "hunyuanvideo-community/HunyuanVideo",
        "hunyuanvideo",
        60,
        24,
        "bfloat16",
        Preset(16, step=29, inference_steps=30, height=480, width=720, source=_DIFFTRACK),
    ),
}
"""By the short name `load_backbone` takes."""


def preset_for(family: str, layers: int, heads: int) -> Preset:
    """The published preset of the model with this shape, or a starting point that says it is one."""
    for model in PUBLISHED_MODELS.values():
        if (model.family, model.layers, model.heads) == (family, layers, heads):
            return model.preset
    layer = min(layers - 1, round(PUBLISHED_LAYER_SHARE * layers))
    return Preset(layer, source="a starting point at the published depth; nothing is published for this model")
