"""What the families trained by flow matching share: noise by interpolation, a time that runs from 0 to 1000."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.inversion import Scheduler
from corrdit.integrations.diffusers.layouts import Arguments


class FlowMatchingBackbone(Backbone):
    """A backbone whose latents at time t are (1 - t / 1000) * clean + t / 1000 * noise."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        share = self.noise_share(timestep)
        return (1 - share) * latents + share * noise

    def noise_share(self, timestep: float) -> float:
        """Share of noise in the latents at a timestep."""
        return timestep / self.pipe.scheduler.config.num_train_timesteps

    def stepping_scheduler(self, inference_steps: int) -> Scheduler:
        scheduler: Scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(inference_steps, **self.schedule_arguments(inference_steps))
        return scheduler

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        return latents.new_full((len(latents),), timestep)

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        """What the family's pipeline gives the scheduler beside the number of steps."""
        return {"sigmas": np.linspace(1.0, 0.0, inference_steps + 1)[:-1]}


class MaskedTextBackbone(Backbone):
    """A backbone whose text is embeddings `[B, tokens, C]` and a mask of the tokens that are no padding."""

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {**super().prompt_shapes, "encoder_attention_mask": (self.text_tokens,)}

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, mask, *_ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )
        return {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": mask.to(self.dtype)}


Statistics: TypeAlias = Sequence[float] | torch.Tensor


def standardized(latents: torch.Tensor, mean: Statistics, std: Statistics, factor: float = 1.0) -> torch.Tensor:
    """Latents `[B, C, F, h, w]` brought to mean 0 and deviation `factor` in each channel."""
    center, spread = (torch.as_tensor(value).view(1, -1, 1, 1, 1).to(latents) for value in (mean, std))
    return (latents - center) * factor / spread
