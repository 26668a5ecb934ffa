"""AnyFlow: Wan distilled to jump between any two times of its flow, both of which it is given for each frame.

Source: diffusers, `AnyFlowTransformer3DModel` and `AnyFlowPipeline`.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.base import NO_IMAGE
from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import AnyFlowLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text


class AnyFlowBackbone(WanBackbone):
    """AnyFlow, bidirectional; run on a video by itself it is asked for the flow at the time of its latents."""

    layout = AnyFlowLayout
    pipelines = ("AnyFlowPipeline",)
    limits = NO_IMAGE

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        return torch.full(latents.shape[:2], timestep, device=latents.device)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        return {**super().further_arguments(latents, times, text, image), "r_timestep": times}
