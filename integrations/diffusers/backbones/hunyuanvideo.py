"""HunyuanVideo: joint attention with the text last and its padding masked, in dual and then single blocks.

Source: diffusers, `HunyuanVideoTransformer3DModel` and `HunyuanVideoPipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone
from corrdit.integrations.diffusers.backbones.frames import with_image_and_mask
from corrdit.integrations.diffusers.family_layouts import HunyuanVideoLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text

EMBEDDED_GUIDANCE = 6000.0
"""The guidance the distilled model is given as a number: 6, times 1000, the pipeline's default."""


class HunyuanVideoBackbone(FlowMatchingBackbone):
    """HunyuanVideo, text to video, and image to video with the latents of an image beside the noisy ones.

    Of the latter some also have a mask of what is given, and some (`token_replace`) nothing beside the latents.
    """

    layout = HunyuanVideoLayout
    pipelines = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline")
    partly = MappingProxyType(
        {
            "image": "of the model that is given the image beside the latents (33 channels) the pipeline drops the "
            "first latent frame of the video, so its generations are not analysed; where the image takes the place of "
            "the first latent frame (16 channels) the scheduler sees the others alone, so that motion is transferred "
            'with optimise="embedding" only'
        }
    )
    text_tokens = 256

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        masks = {"encoder_attention_mask": (self.text_tokens,)}
        return {**super().prompt_shapes, **masks, "pooled_projections": (self.config.pooled_projection_dim,)}

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        return bool(self.config.in_channels > self.latent_channels)

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return with_image_and_mask(latents, image)[:, :, : self.config.in_channels]

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, pooled, mask = self.pipe.encode_prompt(prompt, max_sequence_length=self.text_tokens)
        text = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "pooled_projections": pooled}
        return {name: value.to(self.dtype) for name, value in text.items()}

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        if not self.config.guidance_embeds:
            return {}
        return {"guidance": latents.new_full((len(latents),), EMBEDDED_GUIDANCE)}
