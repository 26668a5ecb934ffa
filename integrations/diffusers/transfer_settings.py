"""Settings of a motion transfer, checked, with the published ones and where they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from corrdit.arguments import choice, finite_number, flag, whole_number
from corrdit.motion.flow_loss import FLOW_LOSSES
from corrdit.motion.smm import SMM_LOSSES

METHODS = ("ditflow", "smm", "moft", "motionclone", "injection", "backbone")
GUIDED_METHODS = ("ditflow", "smm", "moft", "motionclone")
"""Methods that optimise something; "injection" only injects keys and values, "backbone" does nothing."""

OPTIMISED = ("latent", "embedding")
OPTIMISERS = ("adam", "adamw", "sgd")
FLOW_REFERENCES = ("argmax", "soft")
FLOW_HEADS = ("logits", "features", "probabilities")

LARGEST_SCALE = 1e4
"""Of a guidance, classifier-free or not; predictions of 16 bits overflow before."""


@dataclass(frozen=True)
class TransferSettings:
    """How the motion of a reference is given to a new video.

    The defaults are DiTFlow's (arXiv 2412.07776 and its released code) where they do not depend on the model.

    Args:
        blocks: attention layers whose motion is compared, counted over all blocks; negative ones from the last. The
            losses of several are averaged.
        method: "ditflow" (attention motion flow), "smm", "moft", "motionclone", "injection" (keys and values of the
            reference in `injection_blocks`, nothing optimised) or "backbone" (plain generation).
        optimise: "latent", or "embedding" (the absolute table with its text rows frozen, or rotary tables apart for
            queries and keys, whichever the model has).
        steps: denoising steps.
        guided_share: share of them, from the noisiest on, that are guided.
        optimisation_steps: steps of the optimiser at each guided step.
        learning_rate: (first, last), falling in equal parts over the guided steps; the last is reached one step after
            the last guided one, as in the released code. A single number is kept throughout.
        optimizer: "adam", "adamw" or "sgd".
        temperature: factor of the logits of the motion flow.
        heads: how heads are combined in the motion flow: "logits" (released code), "features" (paper) or
            "probabilities".
        loss: "released" or "paper"; of the motion flow or of SMM. None for the released one of the motion flow and the
            paper's of SMM, whose released one takes the target's anchor from the reference.
        flow_reference: "argmax" (hard displacement of the reference) or "soft".
        span: only pairs of frames at most this far apart are compared; None for all.
        window: radius in tokens of the keys a query sees; None for the whole frame.
        tile: with `window`, it lies round the match between tiles of this many tokens a side, not round the query.
        gradient_interval: gradients are computed at every n-th guided step and the last one is used again at the others
            (FastVMT, arXiv 2602.05551).
        motion_channels: share of the channels MOFT follows.
        injection_blocks: attention layers in which, at guided steps, keys and values of the video tokens come from the
            reference, noised to the step with the run's own noise.
        gradient_checkpointing: recompute blocks in the backward pass.
        guidance_scale: of classifier-free guidance; None for the pipeline's own.
        negative_prompt: None for the pipeline's own.
        size: (height, width) of the new video in pixels where a call gives none; None for the reference's.
        scheduler: name of a scheduler class of diffusers; None for the pipeline's own.
        timestep_spacing: of the scheduler, where it has the option.
        pipeline_options: further keyword arguments of the pipeline's call, as (name, value) pairs.
        backend: of the operations: "auto", "triton", "streaming" or "reference".
        source: where the settings come from.

    Raises:
        ValueError: a value out of range, with what is accepted.
    """

    blocks: tuple[int, ...]
    method: str = "ditflow"
    optimise: str = "latent"
    steps: int = 50
    guided_share: float = 0.2
    optimisation_steps: int = 5
    learning_rate: tuple[float, float] = (0.002, 0.001)
    optimizer: str = "adam"
    temperature: float = 2.0
    heads: str = "logits"
    loss: str | None = None
    flow_reference: str = "argmax"
    span: int | None = None
    window: int | None = None
    tile: int | None = None
    gradient_interval: int = 1
    motion_channels: float = 0.04
    injection_blocks: tuple[int, ...] = ()
    gradient_checkpointing: bool = False
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    timestep_spacing: str = "trailing"
    pipeline_options: tuple[tuple[str, Any], ...] = ()
    backend: str = "auto"
    source: str = "given"

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _whole_numbers("blocks", self.blocks))
        object.__setattr__(self, "injection_blocks", _whole_numbers("injection_blocks", self.injection_blocks))
        if self.size is not None:
            height, width = self.size
            object.__setattr__(self, "size", (whole_number("height", height, 1), whole_number("width", width, 1)))
        object.__setattr__(self, "learning_rate", _rates(self.learning_rate))
        options = self.pipeline_options.items() if isinstance(self.pipeline_options, dict) else self.pipeline_options
        object.__setattr__(self, "pipeline_options", tuple((str(name), value) for name, value in options))
        if not self.blocks:
            raise ValueError("blocks is empty; give at least one attention layer")
        for name, accepted in (
            ("method", METHODS),
            ("optimise", OPTIMISED),
            ("optimizer", OPTIMISERS),
            ("heads", FLOW_HEADS),
            ("flow_reference", FLOW_REFERENCES),
            ("backend", ("auto", "triton", "streaming", "reference")),
        ):
            choice(name, getattr(self, name), accepted)
        losses = tuple(dict.fromkeys(FLOW_LOSSES + SMM_LOSSES))
        if self.loss is not None and self.loss not in losses:
            raise ValueError(f"loss must be one of {', '.join(losses)}, or None, got {self.loss!r}")
        for name in ("steps", "optimisation_steps", "gradient_interval"):
            whole_number(name, getattr(self, name), 1)
        for name, least in (("span", 0), ("window", 0), ("tile", 2)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least)
        if self.tile is not None and self.window is None:
            raise ValueError("tile places a window, but window is None; give the radius of the window in tokens")
        if not 0 <= self.guided_share <= 1:
            raise ValueError(f"guided_share is a share of the steps, 0 to 1, got {self.guided_share!r}")
        if not 0 < self.motion_channels <= 1:
            raise ValueError(f"motion_channels is a share above 0 and at most 1, got {self.motion_channels!r}")
        finite_number("temperature", self.temperature, above=0)
        flag("gradient_checkpointing", self.gradient_checkpointing)
        if self.guidance_scale is not None:
            finite_number("guidance_scale", self.guidance_scale, most=LARGEST_SCALE)
        if self.method == "injection" and not self.injection_blocks:
            raise ValueError('method "injection" needs injection_blocks; DiTFlow takes block 0: injection_blocks=(0,)')

    @property
    def optimises(self) -> bool:
        """Whether anything is optimised."""
        return self.method in GUIDED_METHODS and self.guided_steps > 0

    @property
    def guided_steps(self) -> int:
        """Denoising steps that are guided, from the first on."""
        return 0 if self.method == "backbone" else min(self.steps, math.ceil(self.guided_share * self.steps - 1e-9))

    @property
    def loss_variant(self) -> str:
        """The loss in use, "released" or "paper"."""
        return self.loss or ("paper" if self.method == "smm" else "released")

    def rate(self, step: int) -> float:
        """Learning rate of a guided step."""
        first, last = self.learning_rate
        return first + (last - first) * step / self.guided_steps

    def described(self) -> dict[str, object]:
        """All settings as JSON can hold them."""
        values = {**dataclasses.asdict(self), "loss": self.loss_variant}
        values["pipeline_options"] = [[name, repr(value)] for name, value in self.pipeline_options]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changed_settings(settings: TransferSettings, changes: Mapping[str, Any]) -> TransferSettings:
    """The settings with some of them changed.

    Raises:
        ValueError: a name that does not exist, or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(TransferSettings)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; there are {', '.join(known)}")
    return dataclasses.replace(settings, **changes)


def resolved_blocks(name: str, blocks: Iterable[int], layers: int, model: str) -> tuple[int, ...]:
    """Layers counted from 0, ascending.

    Raises:
        ValueError: a layer the model does not have.
    """
    for block in blocks:
        if not -layers <= block < layers:
            raise ValueError(
                f"{name} names layer {block}, but {model} has {layers} attention layers (0 to {layers - 1}, or "
                f"-{layers} to -1 from the last)"
            )
    return tuple(sorted({block % layers for block in blocks}))


def _whole_numbers(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    entries = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else (value,)
    return tuple(whole_number(f"{name} (counted from the last where negative)", entry, -10_000) for entry in entries)


def _rates(value: float | Iterable[float]) -> tuple[float, float]:
    try:
        rates = tuple(float(rate) for rate in value) if isinstance(value, Iterable) else (float(value),) * 2
    except (TypeError, ValueError):
        rates = ()
    if len(rates) != 2 or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"learning_rate must be a number above 0 or two of them (first, last), got {value!r}")
    return (rates[0], rates[1])
