"""Kandinsky 6: Kandinsky 5 with a stream of audio beside the video, connected with it block by block.

Source: diffusers, `Kandinsky6Transformer3DModel` and `Kandinsky6TI2VAPipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.frames import with_image_and_mask
from corrdit.integrations.diffusers.backbones.kandinsky5 import Kandinsky5Backbone
from corrdit.integrations.diffusers.family_layouts import Kandinsky6Layout
from corrdit.integrations.diffusers.layouts import Arguments, Text


class Kandinsky6Backbone(Kandinsky5Backbone):
    """Kandinsky 6, text to video; run on a video by itself it has no audio, and is given no image."""

    layout = Kandinsky6Layout
    pipelines = ("Kandinsky6TI2VAPipeline",)
    partly = MappingProxyType(
        {
            "image": "the image is denoised as a further frame behind those of the video, so a generation from one is "
            "captured and guided, but not analysed, and no motion is transferred to it"
        }
    )
    text_tokens = 1024
    takes_image = False

    @property
    def has_condition(self) -> bool:
        return bool(self.config.visual_cond)

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().prompt_shapes, "encoder_attention_mask": (self.text_tokens,)}

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, pooled, mask, *_ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        # None where nothing is padding.
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        text = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}
        return {name: value.to(self.dtype) for name, value in text.items()}

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return with_image_and_mask(latents, None) if self.has_condition else latents

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        # The model hands the mask on to attention, which adds any that is not bool.
        return {name: value.bool() for name, value in text.items() if name == "encoder_attention_mask"}
