"""The loss of the clean latents that a model predicts, with its velocity taken for a constant."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.inversion import noise_path
from corrdit.integrations.diffusers.layouts import ForwardCall
from corrdit.integrations.diffusers.motion_transfer.latents import LatentLayout
from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.observation import Reader
from corrdit.integrations.diffusers.motion_transfer.optimisation import Leaves, LossFunction
from corrdit.integrations.diffusers.motion_transfer.predicted import CleanPrediction, Forward, along
from corrdit.integrations.diffusers.motion_transfer.step_reference import timestep_of


def prediction_loss(
    backbone: Backbone,
    objective: MotionObjective,
    reader: Reader,
    call: ForwardCall,
    step: int,
    *,
    begun: Tensor,
    known: tuple[Tensor, Tensor],
    predicted: Forward,
    wanted: Any,
) -> LossFunction:
    """The loss of an objective that reads the prediction, as a function of the latents.

    Args:
        backbone: whose pipeline runs, with the run's scheduler.
        objective: with its loss.
        reader: of the new video.
        call: the first of the step.
        step: of the denoising.
        begun: the latents the run began at.
        known: the latents of the step and the pipeline's prediction for them.
        predicted: its prediction for others.
        wanted: of the reference.
    """
    scheduler = backbone.pipe.scheduler
    path = noise_path(scheduler, name=backbone.name)
    here = CleanPrediction(backbone, path, step, timestep_of(call))
    maps = functools.partial(LatentLayout(backbone).maps, grid=call.grid)
    sample = known[0].float()
    mean = None
    if step > 0 and objective.velocity_kept < 1:
        first = CleanPrediction(backbone, path, 0, float(scheduler.timesteps[0]))
        moved = here.normal(sample) - first.normal(begun.to(sample.device).float())
        mean = maps(moved) / (here.sigma - first.sigma)

    def loss_of(leaves: Leaves) -> Tensor:
        latents = leaves["latent"]
        with torch.no_grad():
            output = known[1] if torch.equal(sample, latents) else predicted(latents)
            velocity = maps(here.velocity(latents.float(), output.float()))
            if mean is not None:
                velocity = along(velocity, mean, objective.velocity_kept)
        return objective.loss(reader.prediction(here.clean(maps(latents), velocity), call.grid), wanted)

    return loss_of
