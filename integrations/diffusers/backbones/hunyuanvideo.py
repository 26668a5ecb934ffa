"""HunyuanVideo: joint attention with the text last and its padding masked, in dual and then single blocks.

Source: diffusers, `HunyuanVideoTransformer3DModel` and `HunyuanVideoPipeline`. Latents are `[B, C, F, h, w]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.layouts import Arguments, HunyuanVideoLayout

TEXT_TOKENS = 256
"""Length to which `HunyuanVideoPipeline` pads prompts."""

EMBEDDED_GUIDANCE = 6000.0
"""The guidance the distilled model is given as a number: 6, times 1000, the pipeline's default."""


class HunyuanVideoBackbone(FlowMatchingBackbone):
    """HunyuanVideo, text to video."""

    family = "hunyuanvideo"
    layout = HunyuanVideoLayout

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
        empty = torch.zeros(0, device=self.device, dtype=self.dtype)
        return {
            "encoder_hidden_states": empty.new_zeros(1, TEXT_TOKENS, self.config.text_embed_dim),
            "encoder_attention_mask": empty.new_ones(1, TEXT_TOKENS),
            "pooled_projections": empty.new_zeros(1, self.config.pooled_projection_dim),
        }

    def text_with(self, text: Mapping[str, torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        embeds = prompt_embeds.to(self.dtype)
        return {**text, "encoder_hidden_states": embeds, "encoder_attention_mask": embeds.new_ones(embeds.shape[:2])}

    def call_arguments(self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]) -> Arguments:
        arguments = super().call_arguments(latents, timestep, text)
        if self.config.guidance_embeds:
            arguments["guidance"] = latents.new_full((len(latents),), EMBEDDED_GUIDANCE)
        return arguments
