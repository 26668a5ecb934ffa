"""What a transfer is going to do and about how long it takes, said before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import config_of
from corrdit.integrations.diffusers.motion_transfer.methods import objective_of
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

BACKWARD = 2
"""Forwards that a backward pass takes as long as."""
PROBED_FRAMES, PROBED_TOKENS = 2, 2_400
"""Latent frames, and about the most tokens, that are given to the model to see how fast it is."""


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer is going to do.

    Args:
        frames, height, width: of the new video, in pixels.
        tokens: of the video that the model is given at once.
        steps: of the denoising.
        guided_steps: the first of them, which are guided.
        optimisation_steps: of the optimiser at each of these.
        seconds: it takes, estimated from a short forward; without measures of the result.
    """

    frames: int
    height: int
    width: int
    tokens: int
    steps: int
    guided_steps: int
    optimisation_steps: int
    seconds: float

    def __str__(self) -> str:
        guided = ""
        if self.guided_steps:
            guided = f", {self.guided_steps} of them guided"
            if self.optimisation_steps:
                guided += f" with {self.optimisation_steps} optimisation steps each"
        seconds = max(1, round(self.seconds))
        words = f"{seconds} s" if seconds < 100 else f"{round(seconds / 60):,} min"
        return (
            f"{self.frames} frames of {self.height} x {self.width}, {self.tokens:,} tokens at once; {self.steps} "
            f"denoising steps{guided}; about {words}"
        )


@torch.no_grad()
def transfer_plan(
    backbone: Backbone,
    settings: TransferSettings,
    size: tuple[int, int, int],
    *,
    optimises: bool,
    reads: bool,
) -> TransferPlan:
    """The plan of one transfer; runs the model twice on a few tokens to see how fast it is.

    Args:
        backbone: that generates.
        settings: of the transfer.
        size: frames, height and width of the new video.
        optimises: whether the objective is optimised, not stored motion injected.
        reads: whether a reference is read.
    """
    objective = objective_of(settings)
    frames, height, width = size
    (dy, dx), pixels = backbone.token_stride, backbone.spatial_compression
    rows, columns = height // dy, width // dx
    latent_frames = len(backbone.latent_frame_map(frames))
    config = config_of(backbone.transformer)
    # Learned positions are those of one size.
    fixed = getattr(config, "use_learned_positional_embeddings", False)
    shrink = 1.0 if fixed else min(1.0, (PROBED_TOKENS / PROBED_FRAMES / (rows * columns)) ** 0.5)
    small = [max(1, int(side * shrink)) for side in (rows, columns)]
    channels = backbone.latent_channels * backbone.frames_per_token
    latents = torch.zeros(PROBED_FRAMES, channels, small[0] * dy // pixels, small[1] * dx // pixels)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        float(backbone.predict(latents, 500.0).flatten()[0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    weights = sum(weight.numel() for weight in backbone.transformer.parameters())
    width_of_attention = backbone.heads * backbone.layout().head_width(backbone.transformer) * backbone.layers

    def work(frames: int, rows: int, columns: int) -> float:
        text = backbone.with_text(TokenGrid(frames, rows, columns)).text_tokens
        count = frames * rows * columns
        return 2.0 * weights * count + 4.0 * width_of_attention * (count + text) ** 2

    forward = min(seconds) * work(latent_frames, rows, columns) / work(PROBED_FRAMES, *small)
    read = forward * (max(settings.blocks) + 1) / backbone.layers
    branches = 1 if settings.guidance_scale is not None and settings.guidance_scale <= 1 else 2
    iterations = settings.optimisation_steps if optimises and objective.reads is not None else 0
    injects = bool(objective.injects and settings.injection_blocks)
    guided = settings.guided_steps if objective.reads is not None or injects or not optimises else 0
    iteration = branches * forward if objective.reads == "prediction" else (1 + BACKWARD) * read
    total = settings.steps * branches * forward + guided * iterations * iteration
    return TransferPlan(
        frames,
        height,
        width,
        tokens=latent_frames * rows * columns,
        steps=settings.steps,
        guided_steps=guided,
        optimisation_steps=iterations,
        seconds=total + (read if reads else 0),
    )
