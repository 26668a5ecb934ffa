"""Wan 2.1 and 2.2: self-attention over video tokens only, text by cross-attention, guidance by two calls.

Source: diffusers, `WanTransformer3DModel` and `WanPipeline`. Latents are `[B, C, F, h, w]`. Wan 2.2 (14B) has a second
transformer for the timesteps below a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.layouts import Arguments, Pipeline, WanLayout

TEXT_TOKENS = 512
"""Length to which `WanPipeline` pads prompts."""


class WanBackbone(FlowMatchingBackbone):
    """Wan, text to video, and the image-to-video models without an image encoder (2.2, 14B).

    These are given the latents of the first frame, those of grey frames behind it, and a mask of what is given. The
    pipeline encodes grey frames together with the first one; here each is a latent of its own, as the video's frames.
    """

    family = "wan"
    layout = WanLayout

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

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, _ = self.pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        shape = (1, TEXT_TOKENS, self.config.text_dim)
        return {"encoder_hidden_states": torch.zeros(shape, device=self.device, dtype=self.dtype)}

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        config = self.config
        return config.in_channels == 2 * config.out_channels + self.temporal_compression

    def call_arguments(
        self,
        latents: torch.Tensor,
        timestep: float,
        text: Mapping[str, torch.Tensor],
        image: torch.Tensor | None = None,
    ) -> Arguments:
        self._check_inputs()
        if self.takes_image:
            condition = self._image_condition(latents[:, :1] if image is None else image, latents.shape[1])
        batch, frames, _, height, width = latents.shape
        times = torch.full((batch,), timestep, device=latents.device)
        if getattr(self.pipe.config, "expand_timesteps", False):
            times = times[:, None].expand(
                batch, self._layout.video_grid(self.transformer, frames, height, width).tokens
            )
        if self.takes_image:
            latents = torch.cat([latents, condition], dim=2)
        return {"hidden_states": latents.transpose(1, 2), "timestep": times, **text}

    def _check_inputs(self) -> None:
        config = self.config
        if getattr(config, "image_dim", None) is not None:
            raise ValueError(
                f"{self.name} is an image-to-video model which needs the features of an image encoder beside the "
                "latents; it can be captured while it generates, but not be run on a video by itself"
            )
        if config.in_channels != config.out_channels and not self.takes_image:
            raise ValueError(
                f"{self.name} is given {config.in_channels - config.out_channels} channels beside the latents, not the "
                "image condition of Wan; it can be captured while it generates, but not be run on a video by itself"
            )

    def _image_condition(self, image: torch.Tensor, frames: int) -> torch.Tensor:
        """`[B, F, mask + C, h, w]`: which frames are given, and their latents with grey frames behind them."""
        batch, given, _, height, width = image.shape
        mask = image.new_zeros(batch, frames, self.temporal_compression, height, width)
        mask[:, :given] = 1
        behind = self._grey(height, width).to(image).expand(batch, frames - given, -1, -1, -1)
        return torch.cat([mask, torch.cat([image, behind], dim=1)], dim=2)

    def _grey(self, height: int, width: int) -> torch.Tensor:
        """Latents `[1, 1, C, h, w]` of a grey frame."""
        if self._grey_latents is None or self._grey_latents.shape[-2:] != (height, width):
            stride = self.spatial_compression
            frame = torch.zeros(1, 3, 1, height * stride, width * stride, device=self.device)
            self._grey_latents = self._encode(frame).transpose(1, 2)
        return self._grey_latents
