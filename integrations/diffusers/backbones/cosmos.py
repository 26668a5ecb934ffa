"""Cosmos 1, Predict2 and Predict2.5: self-attention over video tokens, text by cross-attention.

Source: diffusers, `CosmosTransformer3DModel` and the Cosmos pipelines. Latents here are what the transformer is given:
of Predict2 and 2.5 the straight path between video and noise, whatever range of noise the scheduler counts in, with the
share of noise as timestep; of Cosmos 1 scaled as EDM scales them (Karras et al., arXiv 2206.00364, table 1).
"""

from __future__ import annotations

import importlib.util
import math
from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.family_layouts import CosmosLayout
from corrdit.integrations.diffusers.inversion import Scheduler
from corrdit.integrations.diffusers.layouts import Arguments, Text

FRAME_RATES = {1: 30, 2: 16}
"""Frames a second that the pipelines of Cosmos 1 and Predict2 give by default; Predict2.5 gives none."""
GIVEN_SHARE = 0.0001
"""Of noise, in latents that are given; the pipelines' sigma_conditioning."""


class CosmosBackbone(FlowMatchingBackbone):
    """Cosmos, text to video, and video to world, whose given latents take the place of noisy ones."""

    layout = CosmosLayout
    pipelines = (
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
    )
    partly = MappingProxyType(
        {
            "transfer": "the pipeline of Cosmos 1 takes two steps of its scheduler for one; that of Predict2 computes "
            'with its latents beside the transformer, so only optimise="embedding" is open to it'
        }
    )

    def check_use(self, use: str) -> None:
        super().check_use(use)
        if use == "transfer" and self.generation == 1:
            raise ValueError(f"{self.name} cannot be used for transfer: {self.partly[use]}")

    @property
    def generation(self) -> int:
        """1, 2, or 3 for Predict2.5."""
        if hasattr(self.pipe.scheduler, "precondition_inputs"):
            return 1
        return 3 if self.config.get("use_crossattn_projection") else 2

    @property
    def text_option(self) -> str:  # type: ignore[override]
        return "crossattn_proj_in_channels" if self.config.get("use_crossattn_projection") else "text_embed_dim"

    @property
    def latent_channels(self) -> int:
        return int(self.config.out_channels)

    @property
    def takes_image(self) -> bool:
        return bool(self.config.in_channels > self.latent_channels)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config, scale = self.pipe.vae.config, float(self.pipe.scheduler.config.get("sigma_data") or 1)
        if config.latents_mean is None:
            return latents * scale
        if self.generation == 1:
            # One for each of the frames the codec was trained on.
            mean, std = (
                torch.tensor(value).view(1, latents.shape[1], -1, 1, 1)[:, :, : latents.shape[2]].to(latents)
                for value in (config.latents_mean, config.latents_std)
            )
            return (latents - mean) * scale / std
        return standardized(latents, config.latents_mean, config.latents_std, scale)

    def stepping_scheduler(self, inference_steps: int) -> Scheduler:
        scheduler = super().stepping_scheduler(inference_steps)
        if self.generation > 1:
            sigmas = scheduler.sigmas.double()
            scheduler.sigmas = sigmas / (1 + sigmas) if self.generation == 2 else sigmas
            scheduler.timesteps = scheduler.sigmas[:-1]
        return scheduler

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        return {"sigmas": torch.linspace(0, 1, inference_steps).double()} if self.generation == 2 else {}

    def noise_share(self, timestep: float) -> float:
        return timestep

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        if self.generation > 1:
            return super().add_noise(latents, noise, timestep)
        sigma, own = math.exp(4 * timestep), self.pipe.scheduler.config.sigma_data
        return (latents + sigma * noise) / math.sqrt(sigma**2 + own**2)

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        return latents if image is None else torch.cat([image, latents[:, image.shape[1] :]], dim=1)

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        if self.generation == 1:
            return super().times(latents, timestep, image)
        times = latents.new_full((*latents.shape[:2], 1, 1, 1), timestep)
        times[:, : 0 if image is None else image.shape[1]] = GIVEN_SHARE
        return self.arranged(times)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        if self.config.concat_padding_mask and importlib.util.find_spec("torchvision") is None:
            raise ValueError(f"{self.name} resizes its padding mask with torchvision, which is missing; install it")
        height, width = (side * self.spatial_compression for side in latents.shape[3:])
        arguments: Arguments = {"padding_mask": latents.new_zeros(1, 1, height, width)}
        if self.generation in FRAME_RATES:
            arguments["fps"] = FRAME_RATES[self.generation]
        if self.takes_image:
            mask = torch.zeros_like(latents[:, :, :1])
            mask[:, : 0 if image is None else image.shape[1]] = 1
            arguments["condition_mask"] = self.arranged(mask)
        return arguments
