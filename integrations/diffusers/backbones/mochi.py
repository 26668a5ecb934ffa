"""Mochi: joint attention with the text last, sample by sample with the text's padding dropped.

Source: diffusers, `MochiTransformer3DModel` and `MochiPipeline`. Latents are `[B, C, F, h, w]`; time runs from 0
(noise) to 1000. Queries and keys are read padded to the full text length, the padding being masked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout

LINEAR_NOISE_THRESHOLD = 0.025
"""Where the pipeline's schedule turns from linear to quadratic."""


class MochiLayout(TransformerLayout):
    """Where Mochi keeps its attention, and its token axis: frames, then text."""

    guidance = "batched"

    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        return (1, transformer.config.patch_size, transformer.config.patch_size)

    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        batch, _, frames, height, width = arguments["hidden_states"].shape
        text_tokens = arguments["encoder_hidden_states"].shape[1]
        grid = replace(self.video_grid(transformer, frames, height, width), text_tokens=text_tokens, text_first=False)
        return ForwardCall(batch=batch, grid=grid, timestep=arguments["timestep"])


class MochiBackbone(FlowMatchingBackbone):
    """Mochi 1, text to video."""

    family = "mochi"
    layout = MochiLayout

    @property
    def spatial_compression(self) -> int:
        return int(self.pipe.vae_spatial_scale_factor)

    @property
    def temporal_compression(self) -> int:
        return int(self.pipe.vae_temporal_scale_factor)

    def noise_share(self, timestep: float) -> float:
        return 1 - timestep / self.pipe.scheduler.config.num_train_timesteps

    def schedule_arguments(self, inference_steps: int) -> dict[str, Any]:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return {"sigmas": linear_quadratic_schedule(inference_steps, LINEAR_NOISE_THRESHOLD)}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return latents * config.scaling_factor
        return standardized(latents, config.latents_mean, config.latents_std, config.scaling_factor)

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self._text_tokens
        )
        return {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": mask}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        channels = self.transformer.config.text_embed_dim
        return {
            "encoder_hidden_states": torch.zeros(1, self._text_tokens, channels, device=self.device, dtype=self.dtype),
            "encoder_attention_mask": torch.ones(1, self._text_tokens, device=self.device, dtype=torch.bool),
        }

    def text_with(self, text: Mapping[str, torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.ones(prompt_embeds.shape[:2], device=self.device, dtype=torch.bool)
        return {"encoder_hidden_states": prompt_embeds.to(self.dtype), "encoder_attention_mask": mask}

    def with_text(self, video: TokenGrid) -> TokenGrid:
        tokens = self.empty_prompt()["encoder_hidden_states"].shape[1]
        return replace(video, text_tokens=tokens, text_first=False)

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents.transpose(1, 2),
            "timestep": latents.new_full((len(latents),), timestep),
            **text,
        }

    @property
    def _text_tokens(self) -> int:
        return int(self.transformer.config.max_sequence_length)
