"""Guidance away from a perturbed copy of the model: cross-attention guidance and its relatives.

Names are resolved on first use, so that importing this package loads neither diffusers nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "CrossAttentionGuidance": "corrdit.integrations.diffusers.guidance.cross_attention",
    "CrossAttentionGuider": "corrdit.integrations.diffusers.guidance.guider",
    "GuidancePreset": "corrdit.integrations.diffusers.backbones.presets",
    "guidance_preset": "corrdit.integrations.diffusers.backbones.presets",
}
__all__ = ["CrossAttentionGuidance", "CrossAttentionGuider", "GuidancePreset", "guidance_preset"]

if TYPE_CHECKING:
    from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, guidance_preset
    from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
    from corrdit.integrations.diffusers.guidance.guider import CrossAttentionGuider


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.integrations.diffusers.guidance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
