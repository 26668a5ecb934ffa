"""Mochi: joint attention with the text last, sample by sample with the text's padding dropped.

Source: diffusers, `MochiTransformer3DModel` and `MochiPipeline`. Time runs from 0 (noise) to 1000. Queries and keys are
read padded to the full text length, the padding being masked.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.base import NO_IMAGE
from corrdit.integrations.diffusers.backbones.flow_matching import (
    FlowMatchingBackbone,
    MaskedTextBackbone,
    standardized,
)
from corrdit.integrations.diffusers.family_layouts import MochiLayout
from corrdit.integrations.diffusers.layouts import Arguments

LINEAR_NOISE_THRESHOLD = 0.025
"""Where the pipeline's schedule turns from linear to quadratic."""


class MochiBackbone(MaskedTextBackbone, FlowMatchingBackbone):
    """Mochi 1, text to video."""

    layout = MochiLayout
    pipelines = ("MochiPipeline",)
    limits = NO_IMAGE

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_spatial_scale_factor)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_temporal_scale_factor)

    @property
    def text_tokens(self) -> int:
        return int(self.config.max_sequence_length)

    def noise_share(self, timestep: float) -> float:
        return 1 - timestep / self.pipe.scheduler.config.num_train_timesteps

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return {"sigmas": linear_quadratic_schedule(inference_steps, LINEAR_NOISE_THRESHOLD)}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return latents * config.scaling_factor
        return standardized(latents, config.latents_mean, config.latents_std, config.scaling_factor)
