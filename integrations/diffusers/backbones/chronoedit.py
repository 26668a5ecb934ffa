"""ChronoEdit: Wan 2.1's image-to-video model, trained to edit a picture by a short video.

Source: diffusers, `ChronoEditTransformer3DModel` and `ChronoEditPipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import ChronoEditLayout

MANY_STEPS = 10**6
"""More than any run has; behind so many the pipeline goes on with the first and last frame alone."""


class ChronoEditBackbone(WanBackbone):
    """ChronoEdit; of two latent frames it takes the second to be far behind the first."""

    layout = ChronoEditLayout
    pipelines = ("ChronoEditPipeline",)
    call_options = MappingProxyType({"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": MANY_STEPS})
