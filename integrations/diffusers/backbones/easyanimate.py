"""EasyAnimate 5.1: joint attention with the text first, rotary positions made inside.

Source: diffusers, `EasyAnimateTransformer3DModel` and the `EasyAnimatePipeline` family.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.family_layouts import EasyAnimateLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text


class EasyAnimateBackbone(FlowMatchingBackbone):
    """EasyAnimate, text to video, and its inpainting and control models, which are given nothing beside the latents.

    Of the inpainting model that is a mask of ones and latents of zeros: every frame is to be made.
    """

    layout = EasyAnimateLayout
    pipelines = ("EasyAnimatePipeline", "EasyAnimateControlPipeline", "EasyAnimateInpaintPipeline")
    limits = MappingProxyType(
        {
            "image": "the inpainting pipeline of diffusers asks the codec for an option it does not have "
            "(cache_mag_vae) where a frame is given"
        }
    )

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_spatial_compression_ratio)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_temporal_compression_ratio)

    @property
    def text_tokens(self) -> int:
        return 256

    @property
    def latent_channels(self) -> int:
        return int(self.pipe.vae.config.latent_channels)

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        return {"mu": 1}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        beside = self.config.in_channels - self.latent_channels
        if not beside:
            return {}
        mask = latents.new_ones(*latents.shape[:2], beside % self.latent_channels, *latents.shape[3:])
        given = mask.new_zeros(*latents.shape[:2], beside - mask.shape[2], *latents.shape[3:])
        return {"inpaint_latents": self.arranged(torch.cat([mask, given], dim=2))}
