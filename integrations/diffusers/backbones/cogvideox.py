"""CogVideoX: joint attention with the text first, absolute (2B) or rotary (5B, 1.5) positions.

Source: diffusers, `CogVideoXTransformer3DModel` and the `CogVideoXPipeline` family. Latents are `[B, F, C, h, w]`;
1.5 joins two latent frames in one token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import Arguments, CogVideoXLayout


class CogVideoXBackbone(Backbone):
    """CogVideoX-2B, 5B, 1.5 and their image-to-video models, whose image condition is the first frame given."""

    family = "cogvideox"
    layout = CogVideoXLayout
    channel_axis = 2

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        return self.config.in_channels == 2 * self.latent_channels

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae_scaling_factor_image

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self._text_tokens
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        shape = (1, self._text_tokens, self.config.text_embed_dim)
        return {"encoder_hidden_states": torch.zeros(shape, device=self.device, dtype=self.dtype)}

    def call_arguments(
        self,
        latents: torch.Tensor,
        timestep: float,
        text: Mapping[str, torch.Tensor],
        image: torch.Tensor | None = None,
    ) -> Arguments:
        batch, frames, _, height, width = latents.shape
        rotary = None
        self._check_size(height, width)
        if self.config.use_rotary_positional_embeddings:
            stride = self.spatial_compression
            rotary = self.pipe._prepare_rotary_positional_embeddings(
                height * stride, width * stride, frames, self.device
            )
        if self.takes_image:
            condition = self._image_condition(latents[:, :1] if image is None else image, frames)
            latents = torch.cat([latents, condition], dim=2)
        arguments = {
            "hidden_states": latents,
            "timestep": torch.full((batch,), timestep, device=self.device),
            "image_rotary_emb": rotary,
            **text,
        }
        if self.config.ofs_embed_dim is not None:
            arguments["ofs"] = latents.new_full((1,), 2.0)
        return arguments

    def _check_size(self, height: int, width: int) -> None:
        """1.5 cuts its rotary table out of one of fixed size."""
        config = self.config
        if config.patch_size_t is not None and (height > config.sample_height or width > config.sample_width):
            stride = self.spatial_compression
            raise ValueError(
                f"{self.name} has positions for frames of up to {config.sample_height * stride} x "
                f"{config.sample_width * stride} pixels, got {height * stride} x {width * stride}; resize the video"
            )

    def _image_condition(self, image: torch.Tensor, frames: int) -> torch.Tensor:
        """Latents as the pipeline gives those of an image: scaled the other way round for 1.5, zeros behind them."""
        if getattr(self.pipe.vae.config, "invert_scale_latents", False):
            image = image / self.pipe.vae_scaling_factor_image**2
        behind = image.new_zeros(len(image), frames - image.shape[1], *image.shape[2:])
        return torch.cat([image, behind], dim=1)

    @property
    def _text_tokens(self) -> int:
        return int(self.config.max_text_seq_length)
