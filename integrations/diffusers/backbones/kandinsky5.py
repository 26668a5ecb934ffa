"""Kandinsky 5: self-attention over video tokens, text by cross-attention, latents with the channels last.

Source: diffusers, `Kandinsky5Transformer3DModel` and `Kandinsky5T2VPipeline`.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.backbones.frames import with_image_and_mask
from corrdit.integrations.diffusers.family_layouts import Kandinsky5Layout
from corrdit.integrations.diffusers.layouts import Arguments, Text, TransformerLayout


class Kandinsky5Backbone(FlowMatchingBackbone):
    """Kandinsky 5, text to video, and image to video where an image is given."""

    layout: ClassVar[type[TransformerLayout]] = Kandinsky5Layout
    pipelines: ClassVar[tuple[str, ...]] = ("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline")
    text_option = "in_text_dim"

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().prompt_shapes, "pooled_projections": (self.config.in_text_dim2,)}

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_visual_dim)

    @property
    def takes_image(self) -> bool:
        return bool(self.config.visual_cond)

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        return {}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(prompt, max_sequence_length=self.text_tokens)
        return {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return with_image_and_mask(latents, image) if self.takes_image else latents

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        _, frames, _, height, width = latents.shape
        grid, stride = self._layout.video_grid(self.transformer, frames, height, width), self.spatial_compression
        tokens = text["encoder_hidden_states"].shape[1] if text else 0
        return {
            "visual_rope_pos": [torch.arange(n, device=self.device) for n in (grid.frames, grid.height, grid.width)],
            "text_rope_pos": torch.arange(tokens, device=self.device),
            "scale_factor": self.pipe._get_scale_factor(height * stride, width * stride),
        }
