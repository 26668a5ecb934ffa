"""Settings of a motion transfer, checked, with the published ones and where they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from corrdit.arguments import choice, finite_number, flag, whole_number
from corrdit.motion.flow_loss import FLOW_LOSSES, tile_size
from corrdit.motion.smm import SMM_LOSSES
from corrdit.motion.word_attention import checked_path

METHODS = (
    *("ditflow", "smm", "moft", "motionclone", "flowmotion", "steady", "path"),
    *("injection", "query-injection", "backbone"),
)
"""Names of the objectives that stand in `motion_transfer/methods.py`."""

OPTIMISED = ("latent", "embedding")
OPTIMISERS = ("adam", "adamw", "sgd")
RATE_FALLS = ("guided steps", "optimisation steps")
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
        method: "ditflow" (attention motion flow), "smm", "moft", "motionclone", "flowmotion" (predicted clean latents;
            no gradient enters the transformer), "injection" (keys and values of the reference in `injection_blocks`,
            nothing optimised), "query-injection" (queries) or "backbone" (plain generation). Two that need no
            reference: "steady" (temporal diagonals of self-attention are smoothed) and "path" (an object follows a
            box through the attention of its word). Or any `MotionObjective`, as a class or an instance.
        optimise: "latent", or "embedding" (the absolute table with its text rows frozen, or rotary tables apart for
            queries and keys, whichever the model has).
        steps: denoising steps.
        guided_share: share of them that are guided.
        guided_start: share of them, from the noisiest on, behind which guidance begins.
        optimisation_steps: steps of the optimiser at each guided step.
        learning_rate: (first, last), falling in equal parts over the guided steps; the last is reached one step after
            the last guided one, as in the released code. A single number is kept throughout.
        rate_falls: "guided steps", or "optimisation steps" for a rate that falls anew in each guided step (FastVMT).
        optimizer: "adam", "adamw" or "sgd".
        temperature: factor of the logits of the motion flow.
        heads: how heads are combined in the motion flow: "logits" (released code), "features" (paper) or
            "probabilities".
        loss: "released" or "paper"; of the motion flow or of SMM; "pairs" is FastVMT's of the motion flow. None for
            the released one of the motion flow and the paper's of SMM, whose released one takes the target's anchor
            from the reference.
        flow_reference: "argmax" (hard displacement of the reference) or "soft".
        span: only pairs of frames at most this far apart are compared; or (least, most) frames that the key's frame is
            later than the query's, such as (0, 3); None for all.
        window: radius in tokens of the keys a query sees; None for the whole frame.
        tile: with `window`, it lies round the match between tiles of this many tokens a side, or of so many (rows,
            columns), not round the query.
        distance_weights: weights of the squared differences of pairs of frames, (same frame, farthest), falling or
            rising in equal parts with their distance; None for 1.
        tracking_weight: of FastVMT's tracking loss beside the motion flow's; needs `window` and `tile`.
        gradient_interval: gradients are computed at every n-th guided step and the last one is used again at the others
            (FastVMT, arXiv 2602.05551).
        optimiser_interval: gradients are computed at every n-th step of the optimiser in a guided step and the last one
            is used again at the others (FastVMT's released code).
        reference_noised: read the reference at every guided step, noised to it with the run's own noise, instead of
            once and clean.
        source_prompt: the reference is read with it.
        strength: below 1 the generation begins at the reference, noised to this share of the schedule.
        motion_channels: share of the channels MOFT follows.
        injection_blocks: attention layers in which, at guided steps, keys and values of the video tokens come from the
            reference, noised to the step with the run's own noise; queries for "query-injection".
        word: a word of the prompt, for "path".
        path: (time, left, top, right, bottom) of the word's object, for "path", in shares of the video's length and the
            frame's sides; in between the box moves evenly.
        gradient_checkpointing: recompute blocks in the backward pass.
        guidance_scale: of classifier-free guidance; None for the pipeline's own.
        negative_prompt: None for the pipeline's own.
        size: (height, width) of the new video in pixels where a call gives none; None for the reference's.
        scheduler: name of a scheduler class of diffusers; None for the pipeline's own.
        timestep_spacing: of the scheduler, where it has the option.
        scheduler_options: options the scheduler is made with beside the pipeline's, as (name, value) pairs, such as
            ("flow_shift", 7.0).
        pipeline_options: further keyword arguments of the pipeline's call, as (name, value) pairs.
        backend: of the operations: "auto", "triton", "streaming" or "reference".
        source: where the settings come from.

    Raises:
        ValueError: a value out of range, with what is accepted.
    """

    blocks: tuple[int, ...]
    method: Any = "ditflow"
    optimise: str = "latent"
    steps: int = 50
    guided_share: float = 0.2
    guided_start: float = 0.0
    optimisation_steps: int = 5
    learning_rate: tuple[float, float] = (0.002, 0.001)
    rate_falls: str = "guided steps"
    optimizer: str = "adam"
    temperature: float = 2.0
    heads: str = "logits"
    loss: str | None = None
    flow_reference: str = "argmax"
    span: int | tuple[int, int] | None = None
    window: int | None = None
    tile: int | tuple[int, int] | None = None
    distance_weights: tuple[float, float] | None = None
    tracking_weight: float = 0.0
    gradient_interval: int = 1
    optimiser_interval: int = 1
    reference_noised: bool = False
    source_prompt: str = ""
    strength: float = 1.0
    motion_channels: float = 0.04
    injection_blocks: tuple[int, ...] = ()
    word: str | None = None
    path: tuple[tuple[float, ...], ...] = ()
    gradient_checkpointing: bool = False
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    timestep_spacing: str = "trailing"
    scheduler_options: tuple[tuple[str, Any], ...] = ()
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
        for name in ("scheduler_options", "pipeline_options"):
            given = getattr(self, name)
            options = given.items() if isinstance(given, dict) else given
            object.__setattr__(self, name, tuple((str(option), value) for option, value in options))
        if not self.blocks:
            raise ValueError("blocks is empty; give at least one attention layer")
        if isinstance(self.method, str):
            choice("method", self.method, METHODS)
        elif not callable(getattr(self.method, "loss", None)):
            raise TypeError(
                f"method must be one of {', '.join(METHODS)}, or a MotionObjective as a class or an instance, got "
                f"{self.method!r}"
            )
        for name, accepted in (
            ("optimise", OPTIMISED),
            ("optimizer", OPTIMISERS),
            ("rate_falls", RATE_FALLS),
            ("heads", FLOW_HEADS),
            ("flow_reference", FLOW_REFERENCES),
            ("backend", ("auto", "triton", "streaming", "reference")),
        ):
            choice(name, getattr(self, name), accepted)
        losses = tuple(dict.fromkeys(FLOW_LOSSES + SMM_LOSSES))
        if self.loss is not None and self.loss not in losses:
            raise ValueError(f"loss must be one of {', '.join(losses)}, or None, got {self.loss!r}")
        for name in ("steps", "optimisation_steps", "gradient_interval", "optimiser_interval"):
            whole_number(name, getattr(self, name), 1)
        self._check_flow()
        for name in ("guided_share", "guided_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of the steps, 0 to 1, got {getattr(self, name)!r}")
        for name in ("motion_channels", "strength"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share above 0 and at most 1, got {getattr(self, name)!r}")
        finite_number("temperature", self.temperature, above=0)
        for name in ("gradient_checkpointing", "reference_noised"):
            flag(name, getattr(self, name))
        if not isinstance(self.source_prompt, str) or not isinstance(self.word, (str, NoneType)):
            raise ValueError(f"source_prompt and word must be texts, got {self.source_prompt!r} and {self.word!r}")
        object.__setattr__(self, "path", checked_path(self.path) if self.path else ())
        if self.guidance_scale is not None:
            finite_number("guidance_scale", self.guidance_scale, most=LARGEST_SCALE)

    def _check_flow(self) -> None:
        """Check which pairs and tokens the motion flow compares."""
        if isinstance(self.span, (tuple, list)):
            if len(self.span) != 2:
                raise ValueError(f"span must be a number of frames or (least, most), got {self.span!r}")
            least, most = (whole_number("span", frames, -10_000) for frames in self.span)
            if least > most:
                raise ValueError(f"span must be (least, most) frames, got {self.span!r}")
            object.__setattr__(self, "span", (least, most))
        elif self.span is not None:
            whole_number("span", self.span, 0)
        if self.window is not None:
            whole_number("window", self.window, 0)
        if self.tile is not None:
            tile_size(self.tile)
            object.__setattr__(self, "tile", tuple(self.tile) if isinstance(self.tile, list) else self.tile)
            if self.window is None:
                raise ValueError("tile places a window, but window is None; give the radius of the window in tokens")
        if finite_number("tracking_weight", self.tracking_weight, least=0) and self.tile is None:
            raise ValueError("tracking_weight follows the windows of tiles, but tile is None; give window and tile")
        if self.distance_weights is not None:
            if not isinstance(self.distance_weights, (tuple, list)) or len(self.distance_weights) != 2:
                raise ValueError(f"distance_weights must be (same frame, farthest), got {self.distance_weights!r}")
            weights = tuple(finite_number("distance_weights", weight, least=0) for weight in self.distance_weights)
            object.__setattr__(self, "distance_weights", weights)

    @property
    def guided_steps(self) -> int:
        """How many denoising steps are guided."""
        return len(self.guided_window)

    @property
    def guided_window(self) -> range:
        """The denoising steps that are guided."""
        first = min(self.steps, math.ceil(self.guided_start * self.steps - 1e-9))
        count = math.ceil(self.guided_share * self.steps - 1e-9)
        return range(first, min(self.steps, first + count))

    @property
    def loss_variant(self) -> str:
        """The loss in use, "released" or "paper"."""
        return self.loss or ("paper" if self.method == "smm" else "released")

    def rate(self, step: int, iteration: int = 0) -> float:
        """Learning rate of a denoising step, at a step of the optimiser in it."""
        first, last = self.learning_rate
        if self.rate_falls == "optimisation steps":
            return first + (last - first) * iteration / self.optimisation_steps
        return first + (last - first) * (step - self.guided_window.start) / self.guided_steps

    def described(self) -> dict[str, object]:
        """All settings as JSON can hold them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"loss": self.loss_variant, "method": _method_in_words(self.method)}
        for name in ("scheduler_options", "pipeline_options"):
            values[name] = [[option, repr(value)] for option, value in getattr(self, name)]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _method_in_words(method: Any) -> object:
    """A method's name; for a class or an instance where it stands and what it was made with."""
    if isinstance(method, str):
        return method
    kind = method if isinstance(method, type) else type(method)
    name = f"{kind.__module__}.{kind.__qualname__}"
    made_with = {} if isinstance(method, type) else method.described()
    return {"class": name, **{key: repr(value) for key, value in made_with.items()}} if made_with else name


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
