"""Guidance away from a perturbed copy of the model: cross-attention guidance and its relatives."""

from __future__ import annotations

from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, guidance_preset
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance

__all__ = ["CrossAttentionGuidance", "CrossAttentionGuider", "GuidancePreset", "guidance_preset"]


def __getattr__(name: str) -> object:
    # Its base class is one of diffusers, which is not loaded before it is needed.
    if name == "CrossAttentionGuider":
        from corrdit.integrations.diffusers.guidance.guider import CrossAttentionGuider

        return CrossAttentionGuider
    raise AttributeError(f"module 'corrdit.integrations.diffusers.guidance' has no attribute {name!r}")
