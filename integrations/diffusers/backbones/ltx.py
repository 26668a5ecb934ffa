"""LTX-Video: self-attention over packed video tokens, text by cross-attention, rotary before the head split.

Source: diffusers, `LTXVideoTransformer3DModel` and `LTXPipeline`. The transformer is given tokens `[B, F*h*w, C]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout

TEXT_TOKENS = 128
"""Length to which `LTXPipeline` pads prompts."""

FRAME_RATE = 25
"""Frames a second the positions are scaled for, the pipeline's default."""


class LTXLayout(TransformerLayout):
    """Where LTX keeps its attention, and its token axis: frames alone."""

    guidance = "batched"

    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        config = transformer.config
        return (config.patch_size_t, config.patch_size, config.patch_size)

    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if frames is None or height is None or width is None:
            raise ValueError(
                "this forward of LTX gives coordinates instead of num_frames, height and width (conditioning on images "
                "or videos adds tokens), so its tokens are not a grid of frames; use the text-to-video pipeline"
            )
        grid = self.video_grid(transformer, frames, height, width)
        return ForwardCall(batch=arguments["hidden_states"].shape[0], grid=grid, timestep=arguments["timestep"])


class LTXBackbone(FlowMatchingBackbone):
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
        return int(self.transformer.config.in_channels) // (frames * rows * columns)

    def schedule_arguments(self, inference_steps: int) -> dict[str, Any]:
        """The pipeline shifts time by the number of tokens; here as for the longest sequence of its range."""
        config = self.pipe.scheduler.config
        sigmas = np.linspace(1.0, 1 / inference_steps, inference_steps)
        return {"sigmas": sigmas, "mu": config.get("max_shift", 1.15)}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return standardized(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
        return {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": mask}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        channels = self.transformer.config.caption_channels
        return {
            "encoder_hidden_states": torch.zeros(1, TEXT_TOKENS, channels, device=self.device, dtype=self.dtype),
            "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, device=self.device, dtype=torch.bool),
        }

    def text_with(self, text: Mapping[str, torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.ones(prompt_embeds.shape[:2], device=self.device, dtype=torch.bool)
        return {"encoder_hidden_states": prompt_embeds.to(self.dtype), "encoder_attention_mask": mask}

    def with_text(self, video: TokenGrid) -> TokenGrid:
        return video

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        _, frames, _, height, width = latents.shape
        patch_t, patch, _ = self._layout.patch_size(self.transformer)
        size = (frames // patch_t, height // patch, width // patch)
        return self.pipe._unpack_latents(output, *size, patch, patch_t).transpose(1, 2)

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
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
