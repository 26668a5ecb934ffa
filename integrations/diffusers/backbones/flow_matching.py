"""What the families trained by flow matching share: noise by interpolation, a time that runs from 0 to 1000."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.base import Backbone


class FlowMatchingBackbone(Backbone):
    """A backbone whose latents at time t are (1 - t / 1000) * clean + t / 1000 * noise."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        share = self.noise_share(timestep)
        return (1 - share) * latents + share * noise

    def noise_share(self, timestep: float) -> float:
        """Share of noise in the latents at a timestep."""
        return timestep / self.pipe.scheduler.config.num_train_timesteps

    def stepping_scheduler(self, inference_steps: int) -> Any:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(inference_steps, **self.schedule_arguments(inference_steps))
        return scheduler

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output.transpose(1, 2).reshape(latents.shape)

    def schedule_arguments(self, inference_steps: int) -> dict[str, Any]:
        """What the family's pipeline gives the scheduler beside the number of steps."""
        return {"sigmas": np.linspace(1.0, 0.0, inference_steps + 1)[:-1]}


def standardized(latents: torch.Tensor, mean: Any, std: Any, factor: float = 1.0) -> torch.Tensor:
    """Latents `[B, C, F, h, w]` brought to mean 0 and deviation `factor` in each channel."""
    mean = torch.as_tensor(mean).view(1, -1, 1, 1, 1).to(latents)
    std = torch.as_tensor(std).view(1, -1, 1, 1, 1).to(latents)
    return (latents - mean) * factor / std
