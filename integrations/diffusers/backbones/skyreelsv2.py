"""SkyReels-V2: Wan with frames a second as a condition, for diffusion forcing or whole videos.

Source: diffusers, `SkyReelsV2Transformer3DModel` and the `SkyReelsV2Pipeline` family.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import SkyReelsV2Layout
from corrdit.integrations.diffusers.layouts import Arguments, Text

FRAME_RATE_CLASS = 1
"""Of 24 frames a second, the pipelines' default; 0 is 16."""


class SkyReelsV2Backbone(WanBackbone):
    """SkyReels-V2; every frame is given the same timestep."""

    layout = SkyReelsV2Layout
    pipelines = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline", "SkyReelsV2DiffusionForcingPipeline")

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        rate = {"fps": [FRAME_RATE_CLASS] * len(latents)} if self.config.inject_sample_info else {}
        return {**super().further_arguments(latents, times, text, image), **rate}
