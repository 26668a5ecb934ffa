"""Wan 2.1 and 2.2: self-attention over video tokens only, text by cross-attention, guidance by two calls.

Source: diffusers, `WanTransformer3DModel` and `WanPipeline`. Latents are `[B, C, F, h, w]`. Wan 2.2 (14B) has a second
transformer for the timesteps below a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout

TEXT_TOKENS = 512
"""Length to which `WanPipeline` pads prompts."""


class WanLayout(TransformerLayout):
    """Where Wan keeps its attention, and its token axis: frames alone."""

    guidance = "separate"

    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        return [block.attn1 for block in transformer.blocks]

    def block_lists(self, transformer: torch.nn.Module) -> list[str]:
        return ["blocks"]

    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        frames, rows, columns = transformer.config.patch_size
        return (frames, rows, columns)

    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        batch, _, frames, height, width = arguments["hidden_states"].shape
        grid = self.video_grid(transformer, frames, height, width)
        return ForwardCall(batch=batch, grid=grid, timestep=arguments["timestep"])


class WanBackbone(FlowMatchingBackbone):
    """Wan, text to video."""

    family = "wan"
    layout = WanLayout

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_scale_factor_temporal)

    def transformer_at(self, timestep: float) -> torch.nn.Module:
        boundary = getattr(self.pipe.config, "boundary_ratio", None)
        if boundary is None or self.noise_share(timestep) >= boundary:
            return self.transformer
        return self.pipe.transformer_2

    def schedule_arguments(self, inference_steps: int) -> dict[str, Any]:
        return {}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return standardized(latents, config.latents_mean, config.latents_std)

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        shape = (1, TEXT_TOKENS, self.transformer.config.text_dim)
        return {"encoder_hidden_states": torch.zeros(shape, device=self.device, dtype=self.dtype)}

    def with_text(self, video: TokenGrid) -> TokenGrid:
        return video

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        config = self.transformer.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"{self.name} is an image-to-video model, which needs an image beside the latents; it can be captured "
                "while it generates, but not be run on a video by itself"
            )
        batch, frames, _, height, width = latents.shape
        times = torch.full((batch,), timestep, device=latents.device)
        if getattr(self.pipe.config, "expand_timesteps", False):
            times = times[:, None].expand(
                batch, self._layout.video_grid(self.transformer, frames, height, width).tokens
            )
        return {"hidden_states": latents.transpose(1, 2), "timestep": times, **text}
