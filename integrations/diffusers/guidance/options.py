"""Checked settings of a guidance."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from corrdit.arguments import whole_number
from corrdit.integrations.diffusers.guidance.perturbations import AttentionFunction, frame_local, identity_attention
from corrdit.ops.backends import BACKENDS

PERTURBATIONS = ("cross_frame", "identity", "skip")
Heads = int | Iterable[int] | Mapping[int, int | Iterable[int]] | None


@dataclass(frozen=True)
class GuidanceOptions:
    """Settings as `CrossAttentionGuidance` takes them, checked.

    Raises:
        ValueError: a value that is not accepted.
    """

    scale: float
    start: float
    stop: float
    renormalize: bool | None
    span: int
    perturbation: str
    adaptive_scale: float
    backend: str

    def __post_init__(self) -> None:
        for name in ("scale", "adaptive_scale"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of 0 or more, got {value!r}; 0 switches it off")
        for name in ("start", "stop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of the denoising steps, from 0 to 1, got {value!r}")
        if self.start >= self.stop:
            raise ValueError(f"start must be below stop, got start={self.start!r} and stop={self.stop!r}")
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.perturbation!r}")
        if self.renormalize is not None and not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize must be True, False or None, got {self.renormalize!r}")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        whole_number("span", self.span, 0)
        if self.perturbation != "cross_frame" and (self.span or self.renormalize is not None):
            raise ValueError(
                f'span and renormalize belong to perturbation="cross_frame", not to {self.perturbation!r}; leave them '
                "out"
            )

    def includes(self, step: int, count: int) -> bool:
        """Whether a step is guided: the share of the steps done before it is in [start, stop).

        Raises:
            ValueError: none of the steps is.
        """
        if not any(self.start <= each / count < self.stop for each in range(count)):
            raise ValueError(
                f"from start={self.start} to stop={self.stop} is none of the {count} denoising steps, so nothing would "
                "be guided; step k of n has the share k / n, counted from 0"
            )
        return self.start <= step / count < self.stop

    def scale_at(self, timestep: float, train_timesteps: int) -> float:
        """The scale at a timestep: falls by `adaptive_scale` for each timestep from the noisiest, down to 0."""
        return max(0.0, self.scale - self.adaptive_scale * (train_timesteps - timestep))

    def attention(self, renormalize: bool) -> AttentionFunction | None:
        """What perturbed layers compute; None where their blocks are left out."""
        if self.perturbation == "skip":
            return None
        if self.perturbation == "identity":
            return identity_attention
        return frame_local(renormalize=renormalize, span=self.span, backend=self.backend)


def checked_layers(layers: int | Iterable[int], count: int, model: str) -> tuple[int, ...]:
    """Layers as sorted, non-negative numbers.

    Raises:
        ValueError: none, a repeated one, not a whole number, or outside the model.
    """
    given = listed(layers)
    if not given:
        raise ValueError("layers is empty; give at least one attention layer to perturb")
    resolved = []
    for layer in given:
        index = _whole("layers", layer)
        if not -count <= index < count:
            raise ValueError(
                f"layer {index} is outside {model}, which has {count} attention layers (0 to {count - 1}, or -{count} "
                "to -1 from the last)"
            )
        resolved.append(index % count)
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"layers {given} names a layer of {model} twice")
    return tuple(sorted(resolved))


def checked_heads(heads: Heads, layers: tuple[int, ...], count: int, perturbation: str) -> dict[int, tuple[int, ...]]:
    """Perturbed heads by layer; a layer that is not named is perturbed in all.

    Args:
        heads: a head or heads, the same in every layer or by layer (non-negative), or None for all.
        layers: the perturbed layers.
        count: heads of the model.
        perturbation: by name.

    Raises:
        ValueError: heads of a layer that is not perturbed, outside the model, repeated, or with whole blocks left out.
    """
    if heads is None:
        return {}
    if perturbation == "skip":
        raise ValueError('perturbation="skip" leaves whole blocks out and has no heads to choose; leave heads out')
    if isinstance(heads, Mapping):
        by_layer = {layer: listed(chosen) for layer, chosen in heads.items()}
    else:
        same = listed(heads)
        by_layer = {layer: same for layer in layers}
    checked = {}
    for layer, chosen in by_layer.items():
        if layer not in layers:
            raise ValueError(f"heads names layer {layer!r}, which is not perturbed; perturbed are {list(layers)}")
        indices = [_whole("heads", head) for head in chosen]
        if not indices or len(set(indices)) != len(indices) or any(not 0 <= head < count for head in indices):
            raise ValueError(f"heads of layer {layer} must be different numbers from 0 to {count - 1}, got {indices}")
        checked[layer] = tuple(sorted(indices))
    return checked


def model_heads(transformer: torch.nn.Module) -> int:
    """Attention heads of a transformer."""
    return int(transformer.config.num_attention_heads)  # type: ignore[union-attr, arg-type]


def listed(numbers: Any) -> list[Any]:
    """One number, or several of them, as a list."""
    return list(numbers) if isinstance(numbers, Iterable) else [numbers]


def _whole(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, got {value!r}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
