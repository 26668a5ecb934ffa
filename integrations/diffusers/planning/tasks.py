"""The phases of each task, run by the code that does the task itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.published_models import default_layers
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.motion_transfer.guided_run import GuidedRun
from corrdit.integrations.diffusers.motion_transfer.methods import objective_of
from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.observation import Reader
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion, motion_of_latents
from corrdit.integrations.diffusers.motion_transfer.run_state import RunState
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.planning.configured_model import ConfiguredModel
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.tracking.readings import cost_rows, matches_back, read_tokens
from corrdit.tracking.tracker import PointTracker

TASKS = ("track", "capture", "generate", "transfer")


@dataclass(frozen=True)
class Phase:
    """A part of a task during which one component runs.

    Args:
        name: for tables.
        component: that runs; "" where all are sent back and none runs.
        run: does it.
        times: how often the task does it.
    """

    name: str
    component: str
    run: Callable[[], object] = bool
    times: float = 1


@dataclass(frozen=True)
class Request:
    """What is planned.

    Args:
        task: one of `TASKS`.
        frames, height, width: of the video, in pixels.
        steps: of the denoising.
        layers: that are captured or guided; None for the model's own.
        settings: of a transfer.
        points: that are tracked.
        backend: of the operations.
        guided: by classifier-free guidance, which runs two branches.
        cag: with cross-attention guidance.
    """

    task: str
    frames: int
    height: int
    width: int
    steps: int = 50
    layers: tuple[int, ...] | None = None
    settings: TransferSettings | None = None
    points: int = 256
    backend: str = "auto"
    guided: bool = True
    cag: bool = False


class PlannedTask:
    """A task on a model from configurations.

    Args:
        model: the model.
        request: the task.
    """

    def __init__(self, model: ConfiguredModel, request: Request) -> None:
        self._model, self._request = model, request
        self._backbone, self._pipe = model.backbone, model.backbone.pipe
        backbone = self._backbone
        self.latent_frames = len(backbone.latent_frame_map(request.frames))
        stride, pixels = backbone.token_stride, backbone.spatial_compression
        for side, size, step in zip(("height", "width"), (request.height, request.width), stride, strict=True):
            if size % step:
                raise ValueError(
                    f"{side} {size} is not a multiple of {step}, the pixels a token of {backbone.name} spans; give "
                    f"{max(step, round(size / step) * step)}"
                )
        self._latent_size = (request.height // pixels, request.width // pixels)
        self._reference: ReferenceMotion | None = None

    @property
    def grid(self) -> TokenGrid:
        """Tokens of the video."""
        with self._model.running():
            return self._backbone.grid(self.latent_frames, *self._latent_size)

    def phases(self) -> list[Phase]:
        """What the task does, in order."""
        request = self._request
        encode = [
            Phase("text encoding", name, functools.partial(self._encode_text, name), 2) for name in self._encoders
        ]
        decode = Phase("decoding", "vae", self._decode)
        if request.task == "track":
            chunk = min(self._backbone.preset.reading.frames_per_chunk, request.frames)
            chunks = max(1, math.ceil((request.frames - 1) / max(1, chunk - 1)))
            read = Phase("reading a chunk", "transformer", functools.partial(self._read_chunk, chunk), chunks)
            return [Phase("encoding frames", "vae", self._encode_frames), *encode, read]
        if request.task != "transfer":
            return [*encode, Phase("denoising step", "transformer", self._watched_step, request.steps), decode]
        settings = self._settings
        guided = len(settings.guided_window) if self._objective.reads is not None else 0
        phases = [
            *encode,
            Phase("encoding the reference", "vae", self._encode_video),
            Phase("reading the reference", "transformer", self._read_reference),
            Phase("", ""),
            *encode,
            Phase("guided step", "transformer", self._guided_step, guided),
            Phase("denoising step", "transformer", self.step, settings.steps - guided),
            decode,
        ]
        return [phase for phase in phases if phase.times]

    def step(self) -> object:
        """What the pipeline's loop asks of the transformer in one step."""
        with unset_fake_temporarily():
            self._pipe.scheduler = self._backbone.stepping_scheduler(self._request.steps)
        return self._call_transformer()

    @property
    def _encoders(self) -> list[str]:
        return list(self._model.encoders)

    @property
    def _settings(self) -> TransferSettings:
        assert self._request.settings is not None
        return self._request.settings

    @property
    def _objective(self) -> MotionObjective:
        return objective_of(self._settings)

    def _latents(self, batch: int, frames: int | None = None) -> Tensor:
        backbone = self._backbone
        channels = backbone.latent_channels * backbone.frames_per_token
        shape = (batch, frames or self.latent_frames, channels, *self._latent_size)
        return torch.randn(shape, dtype=self._model.dtype, device=self._model.device)

    def _encode_text(self, name: str) -> object:
        tokens = int(self._backbone.empty_prompt()["encoder_hidden_states"].shape[1])
        with torch.no_grad():
            # A second encoder is CLIP's, which takes 77.
            return self._model.encoders[name](torch.zeros(1, min(tokens, 77), dtype=torch.long))

    def _frames(self) -> Tensor:
        request = self._request
        return torch.zeros(request.frames, request.height, request.width, 3, dtype=torch.uint8)

    def _encode_frames(self) -> object:
        return self._backbone.encode_frames(self._frames(), height=self._request.height, width=self._request.width)

    def _encode_video(self) -> object:
        return self._backbone.encode_video(self._frames(), height=self._request.height, width=self._request.width)

    def _decode(self) -> object:
        latents = self._latents(1).reshape(1, -1, self._backbone.latent_channels, *self._latent_size)
        with torch.no_grad():
            return self._pipe.vae.decode(latents.transpose(1, 2), return_dict=False)[0]

    def _read_chunk(self, frames: int) -> object:
        request, stride = self._request, self._backbone.token_stride
        with unset_fake_temporarily():
            tracker = PointTracker(self._backbone, backend=request.backend, height=request.height, width=request.width)
            reading = tracker.settings_of(request.frames, request.height, request.width).reading
        size = (request.height // stride[0], request.width // stride[1])
        latents = self._latents(1, frames)[0]
        with torch.no_grad():
            noise = torch.zeros_like(latents) if reading.noise else None
            pair = read_tokens(self._backbone, latents, reading, size, noise)
            tokens = torch.zeros(min(request.points, size[0] * size[1]), dtype=torch.long)
            return cost_rows(pair, reading, tokens, source=0), matches_back(pair, reading, source=0)

    def _watched_step(self) -> object:
        """A denoising step with layers that are captured or guided."""
        request = self._request
        layers = request.layers or default_layers(self._backbone)
        if request.cag:
            with CrossAttentionGuidance(self._backbone, layers=layers, backend=request.backend):
                return self.step()
        if request.task != "capture":
            return self.step()

        def motion(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
            return ops.soft_displacement(q, k, grid, key_mask=key_mask, backend=request.backend)

        with capture(self._pipe, layers=layers, operation=motion) as captured:
            return self.step(), captured

    def _call_transformer(self) -> object:
        backbone, guided = self._backbone, self._request.guided
        pipe: Any = self._pipe
        with unset_fake_temporarily():
            timestep = float(pipe.scheduler.timesteps[0])
        # What the loop notes down of itself, which tells steps and branches apart.
        pipe._current_timestep, pipe._num_timesteps, pipe._guidance_scale = timestep, 1, 6.0 if guided else 1.0
        together = backbone.layout.guidance == "batched"
        with torch.no_grad():
            arguments = backbone.forward_arguments(self._latents(2 if guided and together else 1), timestep)
            calls = 2 if guided and not together else 1
            return [backbone.transformer(**arguments, return_dict=False)[0] for _ in range(calls)]

    def _read_reference(self) -> object:
        frames = np.zeros((0, 0, 0, 3), np.uint8)
        self._reference = motion_of_latents(self._backbone, frames, self._latents(1)[0], self._settings)
        return self._reference

    def _guided_step(self) -> object:
        """A guided step of the transfer with one step of its optimiser."""
        if self._reference is None and self._objective.needs_reference:
            raise RuntimeError("the reference is read before a guided step")
        settings = replace(self._settings, optimisation_steps=1)
        run = GuidedRun(
            self._backbone, settings, self._objective, self._reference, RunState(""), torch.Generator(),
            Reader(settings, None, PromptWords("", None)),
        )  # fmt: skip
        with ExitStack() as stack:
            with unset_fake_temporarily():
                stack.enter_context(run.attached())
                self._pipe.scheduler.set_timesteps(settings.steps)
            return self._call_transformer()
