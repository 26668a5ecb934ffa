"""Wan 2.1 and 2.2: self-attention over video tokens only, text by cross-attention, guidance by two calls.

Source: diffusers, `WanTransformer3DModel` and `WanPipeline`. Wan 2.2 (14B) has a second transformer for the timesteps
below a boundary; TI2V-5B is given a timestep for every token.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.family_layouts import WanLayout
from corrdit.integrations.diffusers.layouts import Arguments, Pipeline, Text, TransformerLayout

IMAGE_TOKENS = 257
"""Features of CLIP's image encoder, which Wan 2.1's image-to-video models attend to beside the text."""


class WanBackbone(FlowMatchingBackbone):
    """Wan, text to video and image to video.

    Image-to-video models are given the latents of the first frame, those of grey frames behind it, and a mask of what
    is given. The pipeline encodes grey frames together with the first one; here each is a latent of its own, as the
    video's frames. Those of 2.1 also attend to the features of an image encoder: of the first frame as the codec
    decodes it, or zeros where the pipeline has none.
    """

    layout: ClassVar[type[TransformerLayout]] = WanLayout
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanVideoToVideoPipeline", "WanImageToVideoPipeline")
    text_option = "text_dim"

    def __init__(self, pipe: Pipeline, *, name: str, preset: Preset | None = None) -> None:
        super().__init__(pipe, name=name, preset=preset)
        self._grey_latents: torch.Tensor | None = None

    def transformer_at(self, timestep: float) -> torch.nn.Module:
        boundary = getattr(self.pipe.config, "boundary_ratio", None)
        if boundary is None or self.noise_share(timestep) >= boundary:
            return self.transformer
        return self.pipe.transformer_2

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        return {}

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return standardized(latents, config.latents_mean, config.latents_std)

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        config = self.config
        return config.in_channels == 2 * config.out_channels + self.temporal_compression

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        batch, frames, _, height, width = latents.shape
        times = torch.full((batch,), timestep, device=latents.device)
        if getattr(self.pipe.config, "expand_timesteps", False):
            tokens = self._layout.video_grid(self.transformer, frames, height, width).tokens
            return times[:, None].expand(batch, tokens)
        return times

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """With `[B, F, mask + C, h, w]`: which frames are given, and their latents with grey frames behind them."""
        config = self.config
        if not self.takes_image:
            if config.in_channels != config.out_channels:
                raise ValueError(
                    f"{self.name} is given {config.in_channels - config.out_channels} channels beside the latents, not "
                    "the image condition of Wan; it can be captured while it generates, but not be run on a video by "
                    "itself"
                )
            return latents
        image = latents[:, :1] if image is None else image
        batch, frames, _, height, width = latents.shape
        given = image.shape[1]
        mask = image.new_zeros(batch, frames, self.temporal_compression, height, width)
        mask[:, :given] = 1
        behind = self.grey(height, width).to(image).expand(batch, frames - given, -1, -1, -1)
        return torch.cat([latents, mask, torch.cat([image, behind], dim=1)], dim=2)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        if getattr(self.config, "image_dim", None) is None:
            return {}
        first = latents[:, :1] if image is None else image[:, :1]
        return {"encoder_hidden_states_image": self._image_features(first)}

    @torch.no_grad()
    def _image_features(self, first: torch.Tensor) -> torch.Tensor:
        """Of the frame that latents `[B, 1, C, h, w]` stand for."""
        encoder = getattr(self.pipe, "image_encoder", None)
        if encoder is None:
            return first.new_zeros(len(first), IMAGE_TOKENS, self.config.image_dim)
        frames = ((self.decode(latents)[0] + 1) * 127.5 for latents in first)
        pictures = [frame.round().clamp(0, 255).byte().cpu().numpy() for frame in frames]
        return self.pipe.encode_image(pictures, self.device).to(self.dtype)

    def grey(self, height: int, width: int) -> torch.Tensor:
        """Latents `[1, 1, C, h, w]` of a grey frame."""
        if self._grey_latents is None or self._grey_latents.shape[-2:] != (height, width):
            stride = self.spatial_compression
            frame = torch.zeros(1, 3, 1, height * stride, width * stride, device=self.device)
            self._grey_latents = self._encode(frame).transpose(1, 2)
        return self._grey_latents
