"""HunyuanVideo 1.5: joint attention with image, glyphs and text last, one stream of weights for each.

Source: diffusers, `HunyuanVideo15Transformer3DModel` and `HunyuanVideo15Pipeline`. Latents are given with those of an
image and a mask beside them.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.backbones.frames import Posterior, with_image_and_mask
from corrdit.integrations.diffusers.family_layouts import HunyuanVideo15Layout


class HunyuanVideo15Backbone(FlowMatchingBackbone):
    """HunyuanVideo 1.5, text to video, and image to video where an image is given; the image encoder sees none."""

    layout = HunyuanVideo15Layout
    pipelines = ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
    takes_image = True

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        pipe, config = self.pipe, self.config
        text, glyphs = pipe.tokenizer_max_length, pipe.tokenizer_2_max_length
        return {
            "encoder_hidden_states": (text, config.text_embed_dim),
            "encoder_attention_mask": (text,),
            "encoder_hidden_states_2": (glyphs, config.text_embed_2_dim),
            "encoder_attention_mask_2": (glyphs,),
            "image_embeds": (pipe.vision_num_semantic_tokens, config.image_embed_dim),
        }

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        blank = self.blank_prompt()
        found = self.pipe.encode_prompt(prompt)
        return {**blank, **{name: value.to(self.dtype) for name, value in zip(blank, found, strict=False)}}

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return with_image_and_mask(latents, image)

    def posterior(self, clips: torch.Tensor) -> Posterior:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        # The codec's attention takes a single clip.
        parts = [self.pipe.vae.encode(clip).latent_dist.parameters for clip in clips.split(1)]
        return DiagonalGaussianDistribution(torch.cat(parts))
