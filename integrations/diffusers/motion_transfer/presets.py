"""Published settings of motion transfer, and starting points for models without any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.motion_transfer.settings import TransferSettings

PUBLISHED_NEGATIVE_PROMPT = "bad quality, distortions, unrealistic, distorted image, watermark, signature"

_DITFLOW = "DiTFlow's released code"
_PUBLISHED_OPTIONS: dict[str, Any] = {
    "guidance_scale": 7.0,
    "negative_prompt": PUBLISHED_NEGATIVE_PROMPT,
    "injection_blocks": (0,),
    "size": (480, 720),
    "source": _DITFLOW,
}
_COGVIDEOX_2B = TransferSettings(blocks=(15,), scheduler="CogVideoXDDIMScheduler", **_PUBLISHED_OPTIONS)
_COGVIDEOX_5B = TransferSettings(
    blocks=(20,),
    scheduler="CogVideoXDPMScheduler",
    pipeline_options=(("use_dynamic_cfg", True),),
    **_PUBLISHED_OPTIONS,
)
_PUBLISHED = {("cogvideox", 30, 30): _COGVIDEOX_2B, ("cogvideox", 42, 48): _COGVIDEOX_5B}
"""Published settings by (family, layers, heads)."""


def settings_for(backbone: Backbone) -> TransferSettings:
    """The published settings of a model of this shape, or a starting point that says it is one.

    A preset that was calibrated on this very model brings its layer along.
    """
    settings = _settings_of_shape(backbone)
    if backbone.preset.calibrated:
        return replace(settings, blocks=(backbone.preset.layer,), source=backbone.preset.source)
    return settings


def _settings_of_shape(backbone: Backbone) -> TransferSettings:
    published = _PUBLISHED.get((backbone.family, backbone.layers, backbone.heads))
    if published is not None:
        return published
    if backbone.name == "embedded":
        return embedded_settings(backbone)
    return TransferSettings(
        blocks=(backbone.layers // 2,),
        source="a starting point at the published depth; nothing is published for this model",
    )


def embedded_settings(backbone: Backbone) -> TransferSettings:
    """Settings chosen for the embedded model, whose latents are far smaller than those of the published ones."""
    return TransferSettings(
        blocks=(min(4, backbone.layers - 1),),
        learning_rate=(0.02, 0.02),
        source="chosen for the embedded model",
    )
