"""The reference: its frames as the model takes them, and the motion that is read from them."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from corrdit import ops
from corrdit.arguments import whole_number
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import forward_arguments
from corrdit.integrations.diffusers.motion_transfer.latents import codec_latents
from corrdit.integrations.diffusers.motion_transfer.methods import objective_of
from corrdit.integrations.diffusers.motion_transfer.observation import Reader, attention_observed
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.processors import Operation
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.tracking.encoding import working_size
from corrdit.tracking.tracker import TOKENS_PER_FRAME
from corrdit.video.frames import VideoLike, as_frames

EVEN_WITHIN = 0.1
"""Share of a frame's time by which times may differ that are rounded in the file."""
FLAT_BELOW = 2
"""A frame whose pixels differ by no more than this (of 255) shows nothing."""


@dataclass
class ReferenceMotion:
    """A reference as the transfer needs it.

    Args:
        frames: uint8 `[T, H, W, 3]`, as the model is given them.
        latents: `[F, C, h, w]`.
        grid: video and text tokens of the model for it.
        flows: hard displacement between all frames by block, int64 `[F, F, h, w, 2]` (dx, dy) in tokens.
        wanted: what the objective's loss compares with, by block; empty where that is read at every step.
    """

    frames: np.ndarray
    latents: Tensor
    grid: TokenGrid
    flows: dict[int, Tensor] = field(default_factory=dict)
    wanted: dict[int, Any] = field(default_factory=dict)


def prepared_frames(
    backbone: Backbone,
    video: VideoLike,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """A video at a length and size the model can generate; says by a warning what was changed.

    Args:
        backbone: whose codec and token grid the video has to fit.
        video: all that `corrdit.video.as_frames` takes.
        num_frames: frames wanted; None for as many as the video has, the codec can stand for and the model's token
            budget holds: that of one chunk of its preset.
        height, width: size wanted; None for both for the nearest to the video's that fits, within the preset's tokens
            of a frame.

    Returns:
        uint8 `[num_frames, height, width, 3]`.

    Raises:
        ValueError: not such a video, fewer than two latent frames, frames that show nothing at all, or a size that is
            not a multiple of a token.
    """
    frames = torch.as_tensor(as_frames(video, name="reference")[:])
    size = _fitting_size(backbone, frames, height, width)
    frames = _at_size(_at_length(backbone, frames, num_frames, size), size)
    spread = frames.flatten(1).amax(1).int() - frames.flatten(1).amin(1).int()
    flat = (spread <= FLAT_BELOW).nonzero().flatten().tolist()
    if len(flat) == len(frames):
        raise ValueError("every frame of the reference is of one colour, so there is no motion in it to follow")
    if flat:
        _say(f"frames {', '.join(map(str, flat))} of the reference are of one colour; no motion is found there")
    return frames.numpy()


def at_rate(
    frames: np.ndarray, rate: float, wanted: float | None, times: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """A video at another frame rate, by the nearest frames in time; says by a warning what was changed.

    Args:
        frames: `[T, H, W, 3]`.
        rate: of them, frames a second.
        wanted: the rate they shall have; None for their own.
        times: float `[T]` ascending, when each is shown, in seconds, where the rate varies; None for an even rate.

    Returns:
        The frames, and their rate.

    Raises:
        ValueError: a rate that is not above 0.
    """
    if wanted is not None and not (math.isfinite(wanted) and wanted > 0):
        raise ValueError(f"fps must be above 0, got {wanted}")
    steps = None if times is None else np.diff(times)
    if steps is None or not len(steps) or np.ptp(steps) <= EVEN_WITHIN / rate:
        times = None
    if wanted is None or (wanted == rate and times is None):
        return frames, rate
    count = max(1, round(len(frames) / rate * wanted))
    nearest = np.clip(np.round(np.arange(count) * rate / wanted), 0, len(frames) - 1).astype(int)
    if times is not None:
        nearest = np.abs(times - times[0] - (np.arange(count) / wanted)[:, None]).argmin(1)
    _say(f"the reference's {len(frames)} frames at {rate:g} a second are resampled to {count} at {wanted:g}")
    return frames[nearest], wanted


@torch.no_grad()
def reference_motion(
    backbone: Backbone, frames: np.ndarray, settings: TransferSettings, *, region: Tensor | None = None
) -> ReferenceMotion:
    """The motion of a reference: one forward of the clean latents with the source prompt, as a rule the empty one.

    Args:
        backbone: that reads it.
        frames: as `prepared_frames` gives them.
        settings: of the transfer, blocks counted from 0.
        region: bool `[F, h, w]`, the tokens whose motion is wanted; None for all.
    """
    latents = backbone.encode_video(frames, height=frames.shape[1], width=frames.shape[2])
    return motion_of_latents(backbone, frames, latents, settings, region=region)


@torch.no_grad()
def motion_of_latents(
    backbone: Backbone, frames: np.ndarray, latents: Tensor, settings: TransferSettings, *, region: Tensor | None = None
) -> ReferenceMotion:
    """`reference_motion` of frames that are encoded already, as latents `[F, C, h, w]`."""
    timestep = clean_timestep(backbone)
    text = source_text(backbone, settings)
    arguments = backbone.call_arguments(codec_latents(backbone, latents), timestep, text)
    transformer, layout = backbone.transformer_at(timestep), backbone.layout()
    call = layout.read_call(transformer, forward_arguments(transformer, (), arguments))
    reference = ReferenceMotion(frames=frames, latents=latents, grid=call.grid)

    def flow(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        heads, backend = settings.heads, settings.backend
        return ops.hard_displacement(q, k, grid, heads=heads, key_mask=key_mask, backend=backend)[0]

    objective = objective_of(settings)
    reader = source_reader(backbone, settings, region)
    reads = objective.reads if objective.needs_reference and not settings.reference_noised else None
    operations: dict[str, Operation] = {"flow": flow}
    if reads == "attention":
        operations["wanted"] = reader.operation(objective.of_reference)
    observed = attention_observed(transformer, arguments, dict.fromkeys(settings.blocks, operations))
    reference.flows = {block: results["flow"].cpu() for block, results in observed.items()}
    if reads == "attention":
        reference.wanted = {block: results["wanted"] for block, results in observed.items()}
    elif reads == "text attention":
        reference.wanted = reader.blocks(
            reads, transformer, layout, arguments, call.grid, lambda block, read: objective.of_reference(read)
        )
    elif reads == "features":
        # They are compared with those of the transformer that denoises the noisy steps, so they are read from it.
        transformer = backbone.transformer
        reference.wanted = reader.blocks(
            reads, transformer, layout, arguments, call.grid, lambda block, read: objective.of_reference(read)
        )
    return reference


def source_text(backbone: Backbone, settings: TransferSettings) -> dict[str, Tensor]:
    """Text arguments that the reference is read with.

    Raises:
        ValueError: a source prompt for a pipeline without a text encoder.
    """
    if not settings.source_prompt:
        text = backbone.empty_prompt()
    elif getattr(backbone.pipe, "text_encoder", None) is None:
        raise ValueError(f'{backbone.name} has no text encoder for the source prompt; give source_prompt=""')
    else:
        text = backbone.encoded_prompt(settings.source_prompt)
    return {name: value.to(backbone.device) for name, value in text.items()}


def source_reader(backbone: Backbone, settings: TransferSettings, region: Tensor | None) -> Reader:
    """What makes readings of the reference."""
    return Reader(settings, region, PromptWords(settings.source_prompt, getattr(backbone.pipe, "tokenizer", None)))


def clean_timestep(backbone: Backbone) -> float:
    """The timestep at which latents hold no noise: 0, or the end of time for a model whose time runs the other way."""
    share = getattr(backbone, "noise_share", None)
    if share is not None and share(0.0) > 0.5:
        return float(backbone.pipe.scheduler.config.num_train_timesteps)
    return 0.0


def _tokens_of_a_frame(backbone: Backbone) -> int:
    """The most the model is given by itself, as for tracking."""
    own, (dy, dx) = backbone.preset.reading, backbone.token_stride
    if own.tokens_per_frame is None and own.height and own.width:
        return (own.height // dy) * (own.width // dx)
    return own.tokens_per_frame or TOKENS_PER_FRAME


def _at_length(backbone: Backbone, frames: Tensor, num_frames: int | None, size: tuple[int, int]) -> Tensor:
    given = len(frames)
    ratio = backbone.temporal_compression
    takes = f"1 + {ratio} n" if backbone.first_frame_alone else f"{ratio} n"
    wanted = given if num_frames is None else whole_number("num_frames", num_frames, 1)
    fitting = backbone.fitting_frames(wanted)
    if fitting != wanted and num_frames is not None:
        raise ValueError(
            f"num_frames {num_frames} does not fit {backbone.name}, whose codec takes {takes} frames; give "
            f"{fitting} or {fitting + ratio}"
        )
    if fitting < 2 or len(backbone.latent_frame_map(fitting)) < 2:
        raise ValueError(
            f"the reference has {given} frames, of which {backbone.name} makes one latent frame, and one frame has no "
            f"motion; give at least {1 + ratio * max(1, 2 * backbone.frames_per_token - 1)} frames"
        )
    if num_frames is None:
        (dy, dx), joined = backbone.token_stride, backbone.frames_per_token
        budget = backbone.preset.reading.frames_per_chunk * _tokens_of_a_frame(backbone)
        most = (max(2, budget // ((size[0] // dy) * (size[1] // dx))) * joined - 1) * ratio + 1
        if fitting > most:
            _say(
                f"the first {most} of the reference's {given} frames are used, as many as {backbone.name} is given at "
                f"once; num_frames={fitting} takes more of them, in more time and memory"
            )
            return frames[:most]
    if given < fitting:
        _say(f"the reference has {given} frames and {fitting} are wanted; its frames are repeated evenly")
        return frames[torch.linspace(0, given - 1, fitting).round().long()]
    if given > fitting:
        _say(f"the first {fitting} of the reference's {given} frames are used")
    return frames[:fitting]


def _fitting_size(backbone: Backbone, frames: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    rows, columns = int(frames.shape[1]), int(frames.shape[2])
    if height is None and width is None:
        return working_size(rows, columns, backbone.token_stride, _tokens_of_a_frame(backbone))
    size = []
    for name, given, actual, stride in zip(
        ("height", "width"), (height, width), (rows, columns), backbone.token_stride, strict=True
    ):
        nearest = max(stride, round(actual / stride) * stride)
        target = nearest if given is None else whole_number(name, given, 1)
        if target % stride:
            raise ValueError(
                f"{name} {target} is not a multiple of {stride}, the pixels a token of {backbone.name} spans; give "
                f"{max(stride, round(target / stride) * stride)}"
            )
        size.append(target)
    return size[0], size[1]


def _at_size(frames: Tensor, size: tuple[int, int]) -> Tensor:
    own = tuple(frames.shape[1:3])
    if size == own:
        return frames
    _say(f"the reference's frames of {own[0]} x {own[1]} are resized to {size[0]} x {size[1]}")
    images = frames.permute(0, 3, 1, 2)
    resized = [functional.interpolate(part.float(), size, mode="bilinear", antialias=True) for part in images.split(1)]
    return torch.cat(resized).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _say(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=5)
