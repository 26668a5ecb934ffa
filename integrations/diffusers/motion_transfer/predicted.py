"""Guidance by the clean latents a model predicts, whose gradient does not enter the transformer (FlowMotion).

Source: "FlowMotion: Training-Free Flow Guidance for Video Motion Transfer" (arXiv 2603.06289). With the model's
velocity u taken for a constant, the predicted clean latents are z - sigma u, and their gradient in the latents z is
known without the transformer. Noisy latents a x + b e of any schedule are those of flow matching once they are divided
by a + b.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.inversion import NoisePath

Forward = Callable[[Tensor], Tensor]
"""The transformer's output for latents, both in the layout it is given them."""

UNEXPLAINED = 0.05
"""Share of the pipeline's prediction that its branches may leave unexplained: rounding in half precision."""


@dataclass
class StepCalls:
    """The calls of the transformer in one denoising step, to be made again for other latents.

    Args:
        forwards: each call again.
        outputs: of the calls as the pipeline made them.
        batched: whether one call holds [unconditional, conditional].
    """

    forwards: list[Forward] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    batched: bool = False

    def combined(self, prediction: Tensor) -> Forward:
        """The prediction for other latents, branches combined as the pipeline combined them in `prediction`.

        Raises:
            ValueError: a pipeline that does more than classifier-free guidance of two branches.
        """
        branches = self._branches(self.outputs)
        scale = 1.0
        if len(branches) == 2:
            conditional, unconditional = (branch.float() for branch in branches)
            change = conditional - unconditional
            power = float(change.square().sum())
            scale = float(((prediction.float() - unconditional) * change).sum()) / power if power else 1.0
        left = self._mixed(branches, scale) - prediction.float()
        if len(branches) > 2 or float(left.norm()) > UNEXPLAINED * float(prediction.float().norm()):
            raise ValueError(
                "the pipeline makes its prediction of more than a conditional and an unconditional branch (a rescaled "
                "or perturbed guidance), which cannot be made again for other latents; leave that guidance out, or "
                "take another method"
            )

        def predicted(latents: Tensor) -> Tensor:
            return self._mixed(self._branches([forward(latents) for forward in self.forwards]), scale)

        return predicted

    def _branches(self, outputs: list[Tensor]) -> list[Tensor]:
        """Conditional, and unconditional where there is one, in the latents' batch."""
        if self.batched and len(outputs) == 1:
            unconditional, conditional = outputs[0].chunk(2)
            return [conditional, unconditional]
        return outputs

    @staticmethod
    def _mixed(branches: list[Tensor], scale: float) -> Tensor:
        conditional = branches[0].float()
        if len(branches) == 1:
            return conditional
        unconditional = branches[1].float()
        return unconditional + scale * (conditional - unconditional)


class CleanPrediction:
    """Clean latents at one step as a function of noisy ones.

    Args:
        backbone: whose schedule it is.
        path: of the run's scheduler.
        step: of the denoising.
        timestep: of it.
    """

    def __init__(self, backbone: Backbone, path: NoisePath, step: int, timestep: float) -> None:
        self._path, self._step = path, step
        self.signal, self.noise = levels(backbone, timestep)
        total = self.signal + self.noise
        self.sigma, self._total = self.noise / total, total

    def normal(self, latents: Tensor) -> Tensor:
        """Latents as flow matching has them: (1 - sigma) clean + sigma noise."""
        return latents / self._total

    def velocity(self, latents: Tensor, output: Tensor) -> Tensor:
        """The velocity (noise - clean) of the model's output for latents."""
        clean = self._path.clean(latents, output, self._step)
        return (latents - self.signal * clean) / self.noise - clean

    def clean(self, latents: Tensor, velocity: Tensor) -> Tensor:
        """The clean latents for a velocity; differentiable in the latents."""
        return self.normal(latents) - self.sigma * velocity


def levels(backbone: Backbone, timestep: float) -> tuple[float, float]:
    """Factors of the clean latents and of the noise at a timestep."""
    one, zero = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 0.0))
    return float(backbone.add_noise(one, zero, timestep)), float(backbone.add_noise(zero, one, timestep))


def along(velocity: Tensor, mean: Tensor, kept: float) -> Tensor:
    """A velocity with only a share of what it has across a mean one, at every place.

    Args:
        velocity, mean: `[F, C, h, w]`.
        kept: the share.
    """
    length = mean.square().sum(1, keepdim=True)
    projected = (velocity * mean).sum(1, keepdim=True) / (length + 1e-8) * mean
    return projected + kept * (velocity - projected)
