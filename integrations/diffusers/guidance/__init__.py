"""Guidance away from a perturbed copy of the model: cross-attention guidance and its relatives."""

from __future__ import annotations

from corrdit.integrations.diffusers.backbones.presets import GuidancePreset
from corrdit.integrations.diffusers.backbones.published_models import guidance_preset
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance

__all__ = ["CrossAttentionGuidance", "CrossAttentionGuider", "GuidancePreset", "guidance_preset", "layer_skipping"]


def __getattr__(name: str) -> object:
    # Both are made of what is diffusers', which is not loaded before it is needed.
    if name == "CrossAttentionGuider":
        from corrdit.integrations.diffusers.guidance.guider import CrossAttentionGuider

        return CrossAttentionGuider
    if name == "layer_skipping":
        from corrdit.integrations.diffusers.guidance.skippable_layers import layer_skipping

        return layer_skipping
    raise AttributeError(f"module 'corrdit.integrations.diffusers.guidance' has no attribute {name!r}")
