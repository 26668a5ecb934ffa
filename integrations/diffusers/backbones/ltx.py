"""LTX-Video: self-attention over packed video tokens, text by cross-attention, rotary before the head split.

Source: diffusers, `LTXVideoTransformer3DModel` and `LTXPipeline`. The transformer is given tokens `[B, F*h*w, C]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.flow_matching import MaskedTextBackbone, standardized
from corrdit.integrations.diffusers.layouts import Arguments, LTXLayout

TEXT_TOKENS = 128
"""Length to which `LTXPipeline` pads prompts."""

FRAME_RATE = 25
"""Frames a second the positions are scaled for, the pipeline's default."""


class LTXBackbone(MaskedTextBackbone):
    """LTX-Video, text to video."""

    family = "ltx"
    layout = LTXLayout

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

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        """The pipeline shifts time by the number of tokens; here as for the longest sequence of its range."""
        config = self.pipe.scheduler.config
        sigmas = np.linspace(1.0, 1 / inference_steps, inference_steps)
        return {"sigmas": sigmas, "mu": config.get("max_shift", 1.15)}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return standardized(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    @property
    def text_size(self) -> tuple[int, int]:
        return (TEXT_TOKENS, self.config.caption_channels)

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        _, frames, _, height, width = latents.shape
        patch_t, patch, _ = self._layout.patch_size(self.transformer)
        size = (frames // patch_t, height // patch, width // patch)
        return self.pipe._unpack_latents(output, *size, patch, patch_t).transpose(1, 2)

    def call_arguments(self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]) -> Arguments:
        batch, frames, _, height, width = latents.shape
        patch_t, patch, _ = self._layout.patch_size(self.transformer)
        spatial = self.spatial_compression
        return {
            "hidden_states": self.pipe._pack_latents(latents.transpose(1, 2), patch, patch_t),
            "timestep": torch.full((batch,), timestep, device=latents.device),
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (self.temporal_compression / FRAME_RATE, spatial, spatial),
            **text,
        }
