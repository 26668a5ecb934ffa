"""The phases of each task, run by the code that does the task itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.presets import default_layers
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.motion_transfer.guided_run import GuidedRun
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion, clean_timestep, codec_latents, read_motion
from corrdit.integrations.diffusers.motion_transfer.run_state import RunState
from corrdit.integrations.diffusers.planning.fake_model import FakeModel
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.tracking.queries import grid_points
from corrdit.tracking.readings import cost_rows, matches_back, read_tokens
from corrdit.tracking.tracker import PointTracker

TASKS = ("track", "capture", "generate", "transfer")


@dataclass(frozen=True)
class Phase:
    """A part of a task during which one component runs.

    Args:
        name: for tables.
        component: that runs; "" for none, where all are sent back.
        run: does it, and gives what the later phases keep.
        times: how often the task does it.
        codec: whether the codec alone decides what it takes.
    """

    name: str
    component: str
    run: Callable[[], object] | None = None
    times: float = 1
    codec: bool = False


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


class TaskOnFakes:
    """A task on a model without contents.

    Args:
        model: the model.
        request: the task.
    """

    def __init__(self, model: FakeModel, request: Request) -> None:
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

    @property
    def grid(self) -> TokenGrid:
        """Tokens of the video."""
        with self._model.running():
            return self._backbone.grid(self.latent_frames, *self._latent_size)

    def phases(self) -> list[Phase]:
        """What the task does, in order."""
        encode = [Phase("text encoding", name, lambda name=name: self._encode_text(name), 2) for name in self._encoders]
        task = self._request.task
        if task == "track":
            return [*self._tracking(encode)]
        if task == "transfer":
            return [*self._transferring(encode)]
        layers = self._request.layers or default_layers(self._backbone)
        phases = [*encode, Phase("denoising step", "transformer", lambda: self._denoise(layers), self._request.steps)]
        return [*phases, self._decoding]

    @property
    def _encoders(self) -> list[str]:
        return list(self._model.encoders)

    @property
    def _decoding(self) -> Phase:
        return Phase("decoding", "vae", self._decode, codec=True)

    def _tracking(self, encode: list[Phase]) -> Iterator[Phase]:
        """Every frame a latent of its own, the chunks of one query frame, and what is read of each."""
        chunk = self._backbone.preset.reading.frames_per_chunk
        frames = self._request.frames
        chunks = max(1, math.ceil((frames - 1) / max(1, chunk - 1)))
        yield Phase("encoding frames", "vae", self._encode_frames, codec=True)
        yield from encode
        yield Phase("reading a chunk", "transformer", lambda: self._read_chunk(min(chunk, frames)), chunks)

    def _transferring(self, encode: list[Phase]) -> Iterator[Phase]:
        settings = self._settings
        guided = settings.guided_steps if settings.optimises else 0
        yield from encode
        yield Phase("encoding the reference", "vae", self._encode_video, codec=True)
        yield Phase("reading the reference", "transformer", self._read_reference)
        yield Phase("", "")
        yield from encode
        if guided:
            yield Phase("guided step", "transformer", self._guided_step, guided)
        yield Phase("denoising step", "transformer", lambda: self._denoise(None), settings.steps - guided)
        yield self._decoding

    @property
    def _settings(self) -> TransferSettings:
        assert self._request.settings is not None
        return self._request.settings

    def _latents(self, batch: int, frames: int | None = None) -> Tensor:
        backbone = self._backbone
        channels = backbone.latent_channels * backbone.frames_per_token
        return torch.zeros(batch, frames or self.latent_frames, channels, *self._latent_size, dtype=self._model.dtype)

    def _encode_text(self, name: str) -> object:
        tokens = self._backbone.empty_prompt()["encoder_hidden_states"].shape[1]
        with torch.no_grad():
            return self._model.encoders[name](torch.zeros(1, min(tokens, 77) if name.endswith("2") else tokens).long())

    def _encode_frames(self) -> object:
        request = self._request
        frames = torch.zeros(request.frames, request.height, request.width, 3, dtype=torch.uint8)
        return self._backbone.encode_frames(frames, height=request.height, width=request.width)

    def _encode_video(self) -> object:
        request = self._request
        frames = torch.zeros(request.frames, request.height, request.width, 3, dtype=torch.uint8)
        return self._backbone.encode_video(frames, height=request.height, width=request.width)

    def _decode(self) -> object:
        latents = self._latents(1)
        codec = self._backbone.latent_channels
        latents = latents.reshape(1, -1, codec, *self._latent_size).transpose(1, 2)
        with torch.no_grad():
            return self._pipe.vae.decode(latents, return_dict=False)[0]

    def _read_chunk(self, frames: int) -> object:
        request = self._request
        tracker = PointTracker(self._backbone, backend=request.backend, height=request.height, width=request.width)
        reading = tracker.reading
        rows, columns = (size // step for size, step in zip((request.height, request.width), self._backbone.token_stride, strict=True))
        with torch.no_grad():
            pair = read_tokens(self._backbone, self._latents(1, frames), reading, (rows, columns))
            tokens = torch.zeros(min(request.points, rows * columns), dtype=torch.long)
            return cost_rows(pair, reading, tokens, source=0), matches_back(pair, reading, source=0)

    def _denoise(self, layers: tuple[int, ...] | None) -> object:
        """One step of the loop, both branches; with layers to capture or to guide."""
        request = self._request
        if layers is None:
            return self._step()
        if request.cag:
            with CrossAttentionGuidance(self._backbone, layers=layers, backend=request.backend):
                return self._step()
        if request.task != "capture":
            return self._step()

        def motion(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
            return ops.soft_displacement(q, k, grid, key_mask=key_mask, backend=request.backend)

        with capture(self._pipe, layers=layers, operation=motion) as captured:
            return self._step(), captured

    def _step(self) -> object:
        """What the pipeline's loop asks of the transformer in one step."""
        pipe, backbone = self._pipe, self._backbone
        with unset_fake_temporarily():
            pipe.scheduler = backbone.stepping_scheduler(self._request.steps)
        return self._call_transformer()

    def _call_transformer(self) -> object:
        pipe, backbone = self._pipe, self._backbone
        timestep = float(pipe.scheduler.timesteps[0])
        pipe._current_timestep, pipe._num_timesteps = timestep, 1
        pipe._guidance_scale = 6.0 if self._request.guided else 1.0
        together = backbone.layout.guidance == "batched"
        branches = 2 if self._request.guided else 1
        with torch.no_grad():
            arguments = backbone.forward_arguments(self._latents(branches if together else 1), timestep)
            calls = 1 if together else branches
            return [backbone.transformer(**arguments, return_dict=False)[0] for _ in range(calls)]

    def _read_reference(self) -> object:
        return read_motion(self._backbone, self._latents(1)[0], self._settings)

    def _guided_step(self) -> object:
        """A guided step of the transfer: the reference's motion, as many optimisation steps as it has, and the step."""
        latents = self._latents(1)[0]
        reference = ReferenceMotion(frames=None, latents=latents, **self._reference_parts(latents))
        run = GuidedRun(self._backbone, self._settings, reference, RunState(""), torch.Generator())
        with run.attached():
            with unset_fake_temporarily():
                self._pipe.scheduler.set_timesteps(self._settings.steps)
            return self._call_transformer()
