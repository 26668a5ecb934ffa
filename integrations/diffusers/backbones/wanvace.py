"""Wan with VACE's control: a video and a mask beside the noisy latents say what is given.

Source: diffusers, `WanVACETransformer3DModel` and `WanVACEPipeline`.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import WanVACELayout
from corrdit.integrations.diffusers.layouts import Arguments, Text


class WanVACEBackbone(WanBackbone):
    """Wan VACE; run on a video by itself nothing is given: a grey video, and a mask by which all of it is made."""

    layout = WanVACELayout
    pipelines = ("WanVACEPipeline",)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        batch, frames, _, height, width = latents.shape
        grey = self.grey(height, width).to(latents).expand(batch, frames, -1, -1, -1)
        control = torch.cat([grey, grey], dim=2)
        mask = control.new_ones(batch, frames, self.config.vace_in_channels - control.shape[2], height, width)
        return {
            **super().further_arguments(latents, times, text, image),
            "control_hidden_states": self.arranged(torch.cat([control, mask], dim=2)),
        }
