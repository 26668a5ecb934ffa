"""ChronoEdit: Wan 2.1's image-to-video model, trained to edit a picture by a short video.

Source: diffusers, `ChronoEditTransformer3DModel` and `ChronoEditPipeline`.
"""

from __future__ import annotations

from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import ChronoEditLayout


class ChronoEditBackbone(WanBackbone):
    """ChronoEdit; of two latent frames it takes the second to be far behind the first."""

    layout = ChronoEditLayout
