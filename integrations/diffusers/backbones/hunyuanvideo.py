"""HunyuanVideo: joint attention with the text last and its padding masked, in dual and then single blocks.

Source: diffusers, `HunyuanVideoTransformer3DModel` and `HunyuanVideoPipeline`. Latents are `[B, C, F, h, w]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout

TEXT_TOKENS = 256
"""Length to which `HunyuanVideoPipeline` pads prompts."""

EMBEDDED_GUIDANCE = 6000.0
"""The guidance the distilled model is given as a number: 6, times 1000, the pipeline's default."""


class HunyuanVideoLayout(TransformerLayout):
    """Where HunyuanVideo keeps its attention, and its token axis: frames, then text."""

    guidance = "separate"

    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        return [block.attn for name in self.block_lists(transformer) for block in getattr(transformer, name)]

    def block_lists(self, transformer: torch.nn.Module) -> list[str]:
        return ["transformer_blocks", "single_transformer_blocks"]

    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        config = transformer.config
        return (config.patch_size_t, config.patch_size, config.patch_size)

    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        batch, _, frames, height, width = arguments["hidden_states"].shape
        text_tokens = arguments["encoder_hidden_states"].shape[1]
        grid = replace(self.video_grid(transformer, frames, height, width), text_tokens=text_tokens, text_first=False)
        return ForwardCall(batch=batch, grid=grid, timestep=arguments["timestep"])


class HunyuanVideoBackbone(FlowMatchingBackbone):
    """HunyuanVideo, text to video."""

    family = "hunyuanvideo"
    layout = HunyuanVideoLayout

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_scale_factor_temporal)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, pooled, mask = self.pipe.encode_prompt(prompt, max_sequence_length=TEXT_TOKENS)
        return {
            "encoder_hidden_states": embeds.to(self.dtype),
            "encoder_attention_mask": mask.to(self.dtype),
            "pooled_projections": pooled.to(self.dtype),
        }

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        config = self.transformer.config
        like = {"device": self.device, "dtype": self.dtype}
        return {
            "encoder_hidden_states": torch.zeros(1, TEXT_TOKENS, config.text_embed_dim, **like),
            "encoder_attention_mask": torch.ones(1, TEXT_TOKENS, **like),
            "pooled_projections": torch.zeros(1, config.pooled_projection_dim, **like),
        }

    def text_with(self, text: Mapping[str, torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        embeds = prompt_embeds.to(self.dtype)
        return {**text, "encoder_hidden_states": embeds, "encoder_attention_mask": embeds.new_ones(embeds.shape[:2])}

    def with_text(self, video: TokenGrid) -> TokenGrid:
        tokens = self.empty_prompt()["encoder_hidden_states"].shape[1]
        return replace(video, text_tokens=tokens, text_first=False)

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        arguments = {
            "hidden_states": latents.transpose(1, 2),
            "timestep": latents.new_full((len(latents),), timestep),
            **text,
        }
        if self.transformer.config.guidance_embeds:
            arguments["guidance"] = latents.new_full((len(latents),), EMBEDDED_GUIDANCE)
        return arguments
