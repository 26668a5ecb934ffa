"""What is read of the reference at one step of the new video's denoising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.host.forwards import Arguments
from corrdit.integrations.diffusers.inversion import noise_path
from corrdit.integrations.diffusers.layouts import ForwardCall
from corrdit.integrations.diffusers.motion_transfer.attention_editing import AttentionParts, attention_parts_of
from corrdit.integrations.diffusers.motion_transfer.latents import LatentLayout, codec_latents
from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.predicted import CleanPrediction
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion, source_reader, source_text
from corrdit.integrations.diffusers.transfer_settings import TransferSettings


@dataclass(frozen=True)
class StepReference:
    """A reference at a step of a run, noised with the run's own noise where it is not read clean.

    Args:
        backbone: whose pipeline runs, with the run's scheduler.
        settings: with blocks counted from 0.
        objective: that reads it.
        reference: as it was read clean.
        region: bool `[F, h, w]` of tokens; None for all.
    """

    backbone: Backbone
    settings: TransferSettings
    objective: MotionObjective
    reference: ReferenceMotion
    region: Tensor | None

    def noised(self, call: ForwardCall, noise: Tensor | None) -> Tensor:
        """The reference's latents at the step of a call, as the transformer is given them.

        Raises:
            ValueError: a call for another length or size.
        """
        self._check_size(call)
        assert noise is not None
        latents = LatentLayout(self.backbone).of_maps(self.reference.latents)
        return self.backbone.add_noise(latents, noise.to(latents), timestep_of(call)).to(latents.dtype)

    def parts(
        self,
        transformer: Module,
        conditional: Arguments,
        call: ForwardCall,
        condition: Tensor | None,
        noise: Tensor | None,
    ) -> AttentionParts:
        """What of its attention is injected: that of a forward with the new video's prompt."""
        noisy = self.noised(call, noise)
        given = {**conditional, "hidden_states": LatentLayout(self.backbone).joined(noisy, condition)}
        layout, blocks = self.backbone.layout(), self.settings.injection_blocks
        return attention_parts_of(transformer, layout, given, call.grid, blocks, self.objective.injects)

    def wanted(self, transformer: Module, call: ForwardCall, step: int, noise: Tensor | None) -> Any:
        """What the loss compares with: by block, or for an objective that reads the prediction the one.

        Args:
            transformer: of the step.
            call: the first of the step.
            step: of the denoising.
            noise: of the run.
        """
        self._check_size(call)
        objective, backbone = self.objective, self.backbone
        if objective.reads != "prediction" and not self.settings.reference_noised:
            return self.reference.wanted
        timestep, latents = timestep_of(call), LatentLayout(backbone)
        noisy = self.noised(call, noise)
        text = source_text(backbone, self.settings)
        arguments = backbone.call_arguments(codec_latents(backbone, self.reference.latents), timestep, text)
        own, condition = latents.split(arguments["hidden_states"])
        arguments["hidden_states"] = latents.joined(noisy.to(own.dtype), condition)
        reader = source_reader(backbone, self.settings, self.region)
        layout = backbone.layout()
        grid = layout.read_call(transformer, arguments).grid
        if objective.reads == "prediction":
            output = transformer(**arguments, return_dict=False)[0].float()
            here = CleanPrediction(backbone, noise_path(backbone.pipe.scheduler, name=backbone.name), step, timestep)
            clean = here.clean(noisy.float(), here.velocity(noisy.float(), output))
            return objective.of_reference(reader.prediction(latents.maps(clean, grid), grid))
        assert objective.reads is not None

        def keep(block: int, read: Any) -> Any:
            return objective.of_reference(read)

        return reader.blocks(objective.reads, transformer, layout, arguments, grid, keep)

    def _check_size(self, call: ForwardCall) -> None:
        given, needed = self.reference.grid.without_text(), call.grid.without_text()
        if given != needed:
            raise ValueError(
                f"the reference has {given.frames} frames of {given.height} x {given.width} tokens and the new video "
                f"{needed.frames} of {needed.height} x {needed.width}; generate at the reference's length and size"
            )


def timestep_of(call: ForwardCall) -> float:
    """The timestep of a call as a number."""
    return float(torch.as_tensor(call.timestep).max())
