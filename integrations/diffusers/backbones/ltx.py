"""LTX-Video: self-attention over packed video tokens, text by cross-attention, rotary before the head split.

Source: diffusers, `LTXVideoTransformer3DModel` and `LTXPipeline`. The transformer is given tokens `[B, F*h*w, C]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.flow_matching import (
    FlowMatchingBackbone,
    MaskedTextBackbone,
    standardized,
)
from corrdit.integrations.diffusers.family_layouts import LTXLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text, TransformerLayout

FRAME_RATE = 25
"""Frames a second the positions are scaled for, the pipeline's default."""


class LTXBackbone(MaskedTextBackbone, FlowMatchingBackbone):
    """LTX-Video, text to video; run on a video by itself it is given no image."""

    layout: ClassVar[type[TransformerLayout]] = LTXLayout
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline", "LTXImageToVideoPipeline")
    partly: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "image": "the scheduler of LTX-Video's pipeline sees the frames behind the image alone, so that motion is "
            'transferred to a generation from one with optimise="embedding" only'
        }
    )
    text_option = "caption_channels"
    longest_shift = 1.15

    @property
    def text_tokens(self) -> int:
        return 128

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_spatial_compression_ratio)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_temporal_compression_ratio)

    @property
    def latent_channels(self) -> int:
        frames, rows, columns = self._layout.patch_size(self.transformer)
        return int(self.config.in_channels) // (frames * rows * columns)

    @property
    def decoder_arguments(self) -> Arguments:
        return {"temb": torch.zeros(1, device=self.device)} if self.pipe.vae.config.timestep_conditioning else {}

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        """The pipeline shifts time by the number of tokens; here as for the longest sequence of its range."""
        sigmas = np.linspace(1.0, 1 / inference_steps, inference_steps)
        return {"sigmas": sigmas, "mu": self.pipe.scheduler.config.get("max_shift", self.longest_shift)}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return standardized(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        return torch.full((len(latents),), timestep, device=latents.device)

    def arranged(self, latents: torch.Tensor) -> torch.Tensor:
        patch_t, patch, _ = self._layout.patch_size(self.transformer)
        return self.pipe._pack_latents(latents.transpose(1, 2), patch, patch_t)

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        _, frames, _, height, width = latents.shape
        patch_t, patch, _ = self._layout.patch_size(self.transformer)
        size = (frames // patch_t, height // patch, width // patch)
        return self.pipe._unpack_latents(output, *size, patch, patch_t).transpose(1, 2)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        _, frames, _, height, width = latents.shape
        spatial = self.spatial_compression
        scale = (self.temporal_compression / FRAME_RATE, spatial, spatial)
        return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
