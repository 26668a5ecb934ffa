"""The plan of a task: tokens, parameters, peak memory by part, work, and on which cards it fits with which options."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from corrdit.arguments import choice, whole_number
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.backbones.published_models import default_layers
from corrdit.integrations.diffusers.motion_transfer.transfer import MotionTransfer
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.diffusers.planning.cards import CARDS
from corrdit.integrations.diffusers.planning.configured_model import ConfiguredModel, configured_model
from corrdit.integrations.diffusers.planning.kernel_calls import KERNEL_FLOP, kernel_functions, kernels_planned
from corrdit.integrations.diffusers.planning.memory_trace import MemoryTrace, PhaseTrace
from corrdit.integrations.diffusers.planning.repeats import Repeats
from corrdit.integrations.diffusers.planning.residence import Bytes, bytes_of, moving, resident
from corrdit.integrations.diffusers.planning.tasks import TASKS, Phase, PlannedTask, Request
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

DEFAULT_SIZE = (49, 480, 720)
"""Frames, height and width where neither is asked for nor known of the model."""


@dataclass(frozen=True)
class Way:
    """How a task is done.

    Args:
        placement: of the model.
        checkpointing: of gradients, in a transfer.
    """

    placement: Placement = field(default_factory=Placement)
    checkpointing: bool = False

    def __str__(self) -> str:
        placement, words = self.placement, []
        words += [placement.parts.replace("_", " ")] if placement.parts != "device" else ["all on the card"]
        words += ["gradient checkpointing"] if self.checkpointing else []
        words += ["codec in tiles"] if placement.codec_tiling else []
        words += [f"{placement.weights} weights"] if placement.weights != "own" else []
        return ", ".join(words)


@dataclass(frozen=True)
class PhasePlan:
    """A phase of a task.

    Args:
        name, component, times: as of the phase.
        weights: bytes of weights on the card, by component.
        parts: other bytes at the moment of the most, by kind.
        flop: of all its times.
    """

    name: str
    component: str
    times: float
    weights: Bytes
    parts: dict[str, int]
    flop: float

    @property
    def peak(self) -> int:
        """Bytes at the moment of the most."""
        return sum(self.weights.values()) + sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a task takes.

    Args:
        model, task: that are planned.
        dtype: of the weights.
        frames, height, width: of the video.
        tokens, text_tokens: that the transformer is given at once, for one branch.
        parameters: by component.
        sources: where each component's configuration is from.
        way: as asked for.
        phases: in this way.
        fits: for each card, the first way that fits it with its peak in bytes; None where none does.
    """

    model: str
    task: str
    dtype: str
    frames: int
    height: int
    width: int
    tokens: int
    text_tokens: int
    parameters: dict[str, int]
    sources: dict[str, str]
    way: Way
    phases: list[PhasePlan]
    fits: dict[str, tuple[Way, int] | None]

    @property
    def largest(self) -> PhasePlan:
        """The phase that takes the most memory."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """Bytes at the moment of the most."""
        return self.largest.peak

    @property
    def flop(self) -> float:
        """Floating-point operations of the whole task."""
        return sum(phase.flop for phase in self.phases)

    def bounds(self) -> dict[str, float]:
        """Least seconds by card: the work at the data sheet's rate, which no program reaches."""
        return {card.name: self.flop / (card.teraflops * 1e12) for card in CARDS}

    def described(self) -> dict[str, Any]:
        """The plan as JSON can hold it."""
        fits = {
            name: None if found is None else {"options": _described(found[0]), "peak_bytes": found[1]}
            for name, found in self.fits.items()
        }
        values = {name: getattr(self, name) for name in ("model", "task", "dtype", "frames", "height", "width")}
        return {
            **values,
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "parameters": self.parameters,
            "sources": self.sources,
            "options": _described(self.way),
            "peak_bytes": self.peak,
            "peak_phase": self.largest.name,
            "phases": [{**dataclasses.asdict(phase), "peak_bytes": phase.peak} for phase in self.phases],
            "flop": self.flop,
            "bound_seconds": self.bounds(),
            "measured_seconds": None,
            "fits": fits,
        }


def plan(
    model: str | os.PathLike[str],
    task: str = "transfer",
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cuda",
    placement: Placement | None = None,
    steps: int | None = None,
    layers: tuple[int, ...] | None = None,
    cag: bool = False,
    guided: bool | None = None,
    preset: Preset | None = None,
    settings: Mapping[str, Any] | None = None,
    search: bool = True,
) -> Plan:
    """What a task takes, from configurations alone.

    The transformer, its codec and its text encoders run the task's own code on tensors without contents; nothing is
    loaded and nothing downloaded. The card's context, libraries' workspaces and fragments are not counted.

    Args:
        model: "embedded", a folder with `model_index.json` and `config.json` files, or a published checkpoint.
        task: "track" (a chunk of frames and what is read of it), "capture" (a generation whose motion flow is read),
            "generate" or "transfer".
        frames, height, width: of the video; None for those the model was made for.
        dtype: of the weights; None for the model's own.
        device: "cuda", with corrdit's kernels where triton is installed, or "cpu".
        placement: None for everything on the device.
        steps: of the denoising; None for 50, or the transfer's.
        layers: that are captured or guided; None for the model's own.
        cag: whether a generation is guided by cross-attention guidance.
        guided: by classifier-free guidance, which runs two branches; None for what the settings or the pipeline's own
            scale say.
        preset: of the model; None for its own.
        settings: of a transfer, to change by name.
        search: whether to look for ways that fit each card.

    Raises:
        ValueError: an unknown model or task, a size that does not fit the model, settings it does not take, or
            `placement` in shards, which one card has no part of.
    """
    choice("task", task, TASKS)
    choice("device", device, ("cuda", "cpu"))
    asked = placement or Placement()
    if asked.parts == "shards":
        raise ValueError('placement="shards" spreads a model over several cards; a plan is of one. Take another')
    if cag and task != "generate":
        raise ValueError(f'cag goes with task="generate", got task={task!r}')
    if settings and task != "transfer":
        raise ValueError(f'{", ".join(settings)} are settings of task="transfer", got task={task!r}')
    found = configured_model(model, dtype=dtype, device=torch.device(device), preset=preset)
    size = _size(found, frames, height, width)
    request = _request(found, task, size, settings, steps=steps, layers=layers, guided=guided, cag=cag)
    planner = _Planner(found, request, device)
    way = Way(asked, request.settings is not None and request.settings.gradient_checkpointing)
    phases = planner.phases(way)
    grid = planner.grid
    fits: dict[str, tuple[Way, int] | None] = {}
    if search and device == "cuda":
        fits = planner.fitting(way, max(phase.peak for phase in phases))
    return Plan(
        os.fspath(model), task, str(found.dtype).removeprefix("torch."), *size,
        tokens=grid.video_tokens, text_tokens=grid.text_tokens,
        parameters={name: sum(weight.numel() for weight in part.parameters()) for name, part in found.parts.items()},
        sources=found.sources, way=way, phases=phases, fits=fits,
    )  # fmt: skip


def _request(
    model: ConfiguredModel,
    task: str,
    size: tuple[int, int, int],
    settings: Mapping[str, Any] | None,
    *,
    steps: int | None,
    layers: tuple[int, ...] | None,
    guided: bool | None,
    cag: bool,
) -> Request:
    """What is asked for, with what the model has for the rest."""
    chosen = None
    if task == "transfer":
        chosen = MotionTransfer(model.backbone, **dict(settings or {})).settings
        chosen = chosen if steps is None else replace(chosen, steps=whole_number("steps", steps, 1))
    return Request(
        task, *size, steps=chosen.steps if chosen else whole_number("steps", steps or 50, 1),
        layers=layers or default_layers(model.backbone), settings=chosen,
        guided=_is_guided(model, chosen) if guided is None else guided, cag=cag,
    )  # fmt: skip


class _Planner:
    """Traces of the phases in the ways that are asked for, each made once."""

    def __init__(self, model: ConfiguredModel, request: Request, device: str) -> None:
        self._model, self._request, self._device = model, request, device
        self._known: dict[tuple[object, ...], PhaseTrace] = {}
        self._repeats = Repeats()
        self.grid = PlannedTask(model, request).grid

    def phases(self, way: Way) -> list[PhasePlan]:
        """The task done in a way."""
        request, placement = self._request, way.placement
        if request.settings is not None:
            request = replace(request, settings=replace(request.settings, gradient_checkpointing=way.checkpointing))
        task = PlannedTask(self._model, request)
        listed = task.phases()
        weights = resident([phase.component for phase in listed], bytes_of(self._model.parts, placement), placement)
        missing = [phase for phase in listed if phase.component and self._key(phase, way) not in self._known]
        guided = any(phase.name == "guided step" for phase in missing)
        trace = self._trace()
        with self._running(way, trace):
            for phase in listed:
                # A guided step needs what was read of the reference.
                if phase not in missing and not (guided and phase.name == "reading the reference"):
                    continue
                kind = trace.kind("codec") if phase.component == "vae" else contextlib.nullcontext()
                # What is left of the phase before in circles of references does not count, whenever it would go.
                gc.collect()
                with kind, trace.phase() as found:
                    self._run(phase)
                self._known[self._key(phase, way)] = found
        traced = {phase.name: self._known[self._key(phase, way)] for phase in listed if phase.component}
        return [
            PhasePlan(
                phase.name, phase.component, phase.times, there,
                {kind: size for kind, size in self._known[self._key(phase, way)].peak.items() if size},
                phase.times * _flop(phase, traced, request.settings),
            )
            for phase, there in zip(listed, weights, strict=True) if phase.component
        ]  # fmt: skip

    def _run(self, phase: Phase) -> None:
        try:
            phase.run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"{self._model.backbone.name} cannot be planned: what its {phase.component} computes in {phase.name} "
                f"depends on values ({error}), which a model without weights does not have"
            ) from error

    def fitting(self, way: Way, peak: int) -> dict[str, tuple[Way, int] | None]:
        """For each card the first way that fits it: the one asked for, or one that takes less memory and more time."""
        ways = _leaner(way, self._request.settings is not None)
        tried, found = [(way, peak)], dict[str, tuple[Way, int] | None]()
        for card in sorted(CARDS, key=lambda card: -card.gigabytes):
            fitting = next((one for one in tried if one[1] <= card.bytes), None)
            while fitting is None and (following := next(ways, None)) is not None:
                tried.append((following, max(phase.peak for phase in self.phases(following))))
                fitting = tried[-1] if tried[-1][1] <= card.bytes else None
            found[f"{card.gigabytes} GB"] = fitting
        return dict(reversed(found.items()))

    def _trace(self) -> MemoryTrace:
        weights = [t for part in self._model.parts.values() for t in (*part.parameters(), *part.buffers())]
        if self._device == "cpu":
            return MemoryTrace(weights=weights, on_cpu=True)
        return MemoryTrace(kernel_functions(), KERNEL_FLOP, weights=weights)

    @contextlib.contextmanager
    def _running(self, way: Way, trace: MemoryTrace) -> Iterator[None]:
        codec = self._model.backbone.pipe.vae
        if way.placement.codec_tiling:
            codec.enable_tiling()
        kernels = kernels_planned() if self._device == "cuda" else contextlib.nullcontext()
        try:
            repeats = self._repeats.counted(self._model.parts.values(), trace)
            with kernels, self._model.running(), moving(self._model.parts, way.placement, trace), repeats:
                yield
        finally:
            if way.placement.codec_tiling:
                codec.disable_tiling()

    def _key(self, phase: Phase, way: Way) -> tuple[object, ...]:
        """What decides a phase's trace."""
        placement = way.placement
        moved = placement.parts if placement.parts in ("offload_groups", "offload_layers") else None
        if phase.component == "vae":
            return (phase.name, placement.codec_tiling, moved == "offload_layers")
        if phase.component.startswith("transformer"):
            return (phase.name, moved, placement.weights, way.checkpointing and phase.name == "guided step")
        return (phase.name, phase.component, moved)


def _flop(phase: Phase, traced: Mapping[str, PhaseTrace], settings: TransferSettings | None) -> float:
    """Work of a phase once; a guided step was traced with one of its optimisation steps."""
    own = traced[phase.name].flop
    if phase.name != "guided step" or settings is None:
        return own
    plain = traced["denoising step"].flop if "denoising step" in traced else 0.0
    return plain + settings.optimisation_steps * (own - plain)


def _leaner(way: Way, transfer: bool) -> Iterator[Way]:
    """Ways of less and less memory, none of which changes weights."""
    order, own = ("device", "offload", "offload_groups", "offload_layers"), way.placement
    for parts in order[order.index(own.parts) : 3]:
        for tiling in (False, True):
            leaner = Way(replace(own, parts=parts, codec_tiling=tiling or own.codec_tiling), transfer)
            if leaner != way:
                yield leaner


def _configured_size(backbone: Backbone) -> tuple[int, int, int] | None:
    """What the pipeline makes where it is asked for no size, if its transformer's configuration says so."""
    config: Any = backbone.transformer.config
    pixels = backbone.spatial_compression
    own = [config.get(f"sample_{side}") for side in ("frames", "height", "width")]
    if not all(isinstance(value, int) for value in own):
        return None
    return own[0], own[1] * pixels, own[2] * pixels


def _size(model: ConfiguredModel, *given: int | None) -> tuple[int, int, int]:
    known = model.size or _configured_size(model.backbone) or DEFAULT_SIZE
    reading = model.backbone.preset.reading
    if model.size is None and reading.height and reading.width:
        known = (known[0], reading.height, reading.width)
    frames, height, width = (
        own if value is None else whole_number(name, value, 1)
        for name, value, own in zip(("frames", "height", "width"), given, known, strict=True)
    )
    return frames, height, width


def _is_guided(model: ConfiguredModel, settings: TransferSettings | None) -> bool:
    """Whether a generation without further arguments runs two branches."""
    defaults = inspect.signature(type(model.backbone.pipe).__call__).parameters
    # HunyuanVideo's guidance_scale is an input of the model.
    name = "true_cfg_scale" if "true_cfg_scale" in defaults else "guidance_scale"
    scale = defaults[name].default if name in defaults else 1.0
    if settings is not None and settings.guidance_scale is not None and name == "guidance_scale":
        scale = settings.guidance_scale
    return float(scale) > 1


def _described(way: Way) -> dict[str, object]:
    return {**dataclasses.asdict(way.placement), "gradient_checkpointing": way.checkpointing}
