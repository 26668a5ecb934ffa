"""Checked settings of a guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from corrdit.arguments import choice, resolved_index, whole_indices, whole_number
from corrdit.integrations.diffusers.guidance.perturbations import AttentionFunction, frame_local, identity_attention
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.transfer_settings import LARGEST_SCALE
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
            if not _is_number(value) or not 0 <= value <= LARGEST_SCALE:
                raise ValueError(
                    f"{name} must be a finite number of 0 or more and at most {LARGEST_SCALE:g}, got {value!r}; 0 "
                    "switches it off"
                )
        for name in ("start", "stop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} is a share of the denoising steps, from 0 to 1, got {value!r}")
        if self.start >= self.stop:
            raise ValueError(f"start must be below stop, got start={self.start!r} and stop={self.stop!r}")
        choice("perturbation", self.perturbation, PERTURBATIONS)
        if self.renormalize is not None and not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize must be True, False or None, got {self.renormalize!r}")
        choice("backend", self.backend, BACKENDS)
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
    given = whole_indices("layers", layers)
    among = f"{model}, which has {count} attention layers"
    resolved = sorted({resolved_index("layer", layer, count, among) for layer in given})
    if len(resolved) != len(given):
        raise ValueError(f"layers {given} names a layer of {model} twice")
    return tuple(resolved)


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
        by_layer = {layer: whole_indices("heads", chosen) for layer, chosen in heads.items()}
    else:
        by_layer = dict.fromkeys(layers, whole_indices("heads", heads))
    for layer, chosen in by_layer.items():
        if layer not in layers:
            raise ValueError(f"heads names layer {layer!r}, which is not perturbed; perturbed are {list(layers)}")
        if len(set(chosen)) != len(chosen) or any(not 0 <= head < count for head in chosen):
            raise ValueError(f"heads of layer {layer} must be different numbers from 0 to {count - 1}, got {chosen}")
    return {layer: tuple(sorted(chosen)) for layer, chosen in by_layer.items()}


def model_heads(transformer: torch.nn.Module) -> int:
    """Attention heads of a transformer."""
    return layout_of(transformer).heads(transformer)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
