"""What the families trained by flow matching share: noise by interpolation, a time that runs from 0 to 1000."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
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

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output.transpose(1, 2).reshape(latents.shape)

    def call_arguments(self, latents: torch.Tensor, timestep: float, text: Mapping[str, torch.Tensor]) -> Arguments:
        times = latents.new_full((len(latents),), timestep)
        return {"hidden_states": latents.transpose(1, 2), "timestep": times, **text}

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        """What the family's pipeline gives the scheduler beside the number of steps."""
        return {"sigmas": np.linspace(1.0, 0.0, inference_steps + 1)[:-1]}


class MaskedTextBackbone(FlowMatchingBackbone):
    """A backbone whose text is embeddings `[B, tokens, C]` and a mask of the tokens that are no padding."""

    @property
    @abc.abstractmethod
    def text_size(self) -> tuple[int, int]:
        """(tokens, channels) of a prompt."""

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_size[0]
        )
        return {"encoder_hidden_states": embeds.to(self.dtype), "encoder_attention_mask": mask}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        return self.text_with({}, torch.zeros(1, *self.text_size, device=self.device))

    def text_with(self, text: Mapping[str, torch.Tensor], prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = torch.ones(prompt_embeds.shape[:2], device=self.device, dtype=torch.bool)
        return {"encoder_hidden_states": prompt_embeds.to(self.dtype), "encoder_attention_mask": mask}


Statistics: TypeAlias = Sequence[float] | torch.Tensor


def standardized(latents: torch.Tensor, mean: Statistics, std: Statistics, factor: float = 1.0) -> torch.Tensor:
    """Latents `[B, C, F, h, w]` brought to mean 0 and deviation `factor` in each channel."""
    center, spread = (torch.as_tensor(value).view(1, -1, 1, 1, 1).to(latents) for value in (mean, std))
    return (latents - center) * factor / spread
