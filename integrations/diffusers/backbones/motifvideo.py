"""Motif-Video: joint attention with the text last, then blocks that decode the video from what was encoded.

Source: diffusers, `MotifVideoTransformer3DModel` and `MotifVideoPipeline`. Latents are given with those of an image and
a mask beside them.
"""

from __future__ import annotations

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.flow_matching import (
    FlowMatchingBackbone,
    MaskedTextBackbone,
    standardized,
)
from corrdit.integrations.diffusers.backbones.frames import with_image_and_mask
from corrdit.integrations.diffusers.family_layouts import MotifVideoLayout
from corrdit.integrations.diffusers.layouts import Arguments

LONGEST_SHIFT = 1.15
"""Of the schedule, for the longest sequence of its range."""


class MotifVideoBackbone(MaskedTextBackbone, FlowMatchingBackbone):
    """Motif-Video, text to video, and image to video where an image is given."""

    layout = MotifVideoLayout
    pipelines = ("MotifVideoPipeline", "MotifVideoImage2VideoPipeline")
    takes_image = True

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return standardized(latents, config.latents_mean, config.latents_std)

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, _, mask, _ = self.pipe.encode_prompt(prompt, max_sequence_length=self.text_tokens)
        return {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": mask.to(self.dtype)}

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        sigmas = np.linspace(1.0, 1 / inference_steps, inference_steps)
        return {"sigmas": sigmas, "mu": self.pipe.scheduler.config.get("max_shift", LONGEST_SHIFT)}

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return with_image_and_mask(latents, image)
