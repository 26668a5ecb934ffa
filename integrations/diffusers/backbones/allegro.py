"""Allegro: self-attention over video tokens, text by cross-attention; its codec has no frame that stands alone.

Source: diffusers, `AllegroTransformer3DModel` and `AllegroPipeline`.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.base import NO_IMAGE
from corrdit.integrations.diffusers.backbones.flow_matching import MaskedTextBackbone
from corrdit.integrations.diffusers.backbones.frames import Posterior
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.family_layouts import AllegroLayout
from corrdit.integrations.diffusers.layouts import Arguments, Pipeline, Text


class AllegroBackbone(MaskedTextBackbone):
    """Allegro, text to video."""

    layout = AllegroLayout
    pipelines = ("AllegroPipeline",)
    limits = NO_IMAGE
    text_option = "caption_channels"
    first_frame_alone = False

    def __init__(self, pipe: Pipeline, *, name: str, preset: Preset | None = None) -> None:
        super().__init__(pipe, name=name, preset=preset)
        # Without it the codec decodes nothing.
        if pipe.vae is not None:
            pipe.vae.enable_tiling()

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        batch, frames, _, height, width = latents.shape
        size = (height * self.spatial_compression, width * self.spatial_compression)
        rotary = self.pipe._prepare_rotary_positional_embeddings(batch, *size, frames, self.device)
        return {"image_rotary_emb": rotary}

    def posterior(self, clips: torch.Tensor) -> Posterior:
        """As the codec's own encoder; its tiles, without which it encodes nothing, leave out what no tile fits."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        vae = self.pipe.vae
        latents = vae.encoder(clips).transpose(1, 2)
        moments = vae.quant_conv(latents.flatten(0, 1)).unflatten(0, latents.shape[:2]).transpose(1, 2)
        return DiagonalGaussianDistribution(moments)
