"""CogVideoX: joint attention with the text first, absolute (2B) or rotary (5B, 1.5) positions.

Source: diffusers, `CogVideoXTransformer3DModel` and the `CogVideoXPipeline` family. 1.5 joins two latent frames in one
token.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.family_layouts import CogVideoXLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text, TransformerLayout


class CogVideoXBackbone(Backbone):
    """CogVideoX-2B, 5B, 1.5 and their image-to-video models, whose image condition is the first frame given."""

    layout: ClassVar[type[TransformerLayout]] = CogVideoXLayout
    pipelines: ClassVar[tuple[str, ...]] = (
        "CogVideoXPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
        "CogVideoXImageToVideoPipeline",
    )
    partly = MappingProxyType(
        {
            "image": "the 2B model has no weights for it, and no pipeline gives it an image; it can begin at a picture "
            "repeated as a video (CogVideoXVideoToVideoPipeline)"
        }
    )

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        return self.config.in_channels == 2 * self.latent_channels

    @property
    def text_tokens(self) -> int:
        return int(self.config.max_text_seq_length)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents * self.pipe.vae_scaling_factor_image

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        frames, height, width = latents.shape[1], latents.shape[3], latents.shape[4]
        self._check_size(height, width)
        arguments: Arguments = {"image_rotary_emb": None}
        if self.config.use_rotary_positional_embeddings:
            size = (height * self.spatial_compression, width * self.spatial_compression)
            arguments["image_rotary_emb"] = self.pipe._prepare_rotary_positional_embeddings(*size, frames, self.device)
        if getattr(self.config, "ofs_embed_dim", None) is not None:
            arguments["ofs"] = latents.new_full((1,), 2.0)
        return arguments

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """Latents as the pipeline gives those of an image: scaled the other way round for 1.5, zeros behind them."""
        if not self.takes_image:
            return latents
        image = latents[:, :1] if image is None else image
        if getattr(self.pipe.vae.config, "invert_scale_latents", False):
            image = image / self.pipe.vae_scaling_factor_image**2
        behind = image.new_zeros(len(image), latents.shape[1] - image.shape[1], *image.shape[2:])
        return torch.cat([latents, torch.cat([image, behind], dim=1)], dim=2)

    def _check_size(self, height: int, width: int) -> None:
        """1.5 cuts its rotary table out of one of fixed size."""
        config = self.config
        joins_frames = getattr(config, "patch_size_t", None) is not None
        if joins_frames and (height > config.sample_height or width > config.sample_width):
            stride = self.spatial_compression
            raise ValueError(
                f"{self.name} has positions for frames of up to {config.sample_height * stride} x "
                f"{config.sample_width * stride} pixels, got {height * stride} x {width * stride}; resize the video"
            )
