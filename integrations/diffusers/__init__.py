"""Reading and steering diffusers' video transformers.

Names are resolved on first use, so that importing this package loads neither diffusers nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "Backbone": "corrdit.integrations.diffusers.backbones.base",
    "Capture": "corrdit.integrations.diffusers.captures",
    "CorrespondenceProcessor": "corrdit.integrations.diffusers.processors",
    "CrossAttentionGuidance": "corrdit.integrations.diffusers.guidance",
    "MotionTransfer": "corrdit.integrations.diffusers.motion_transfer",
    "GuidancePreset": "corrdit.integrations.diffusers.backbones.presets",
    "Preset": "corrdit.integrations.diffusers.backbones.presets",
    "ReadingPreset": "corrdit.tracking.options",
    "TransformerLayout": "corrdit.integrations.diffusers.layouts",
    "available_backbones": "corrdit.integrations.diffusers.backbones.loading",
    "backbone_of": "corrdit.integrations.diffusers.backbones.loading",
    "capture": "corrdit.integrations.diffusers.captures",
    "load_backbone": "corrdit.integrations.diffusers.backbones.loading",
    "register_layout": "corrdit.integrations.diffusers.layouts",
}
__all__ = [
    "Backbone",
    "Capture",
    "CorrespondenceProcessor",
    "CrossAttentionGuidance",
    "GuidancePreset",
    "MotionTransfer",
    "Preset",
    "ReadingPreset",
    "TransformerLayout",
    "available_backbones",
    "backbone_of",
    "capture",
    "load_backbone",
    "register_layout",
]

if TYPE_CHECKING:
    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.integrations.diffusers.backbones.loading import available_backbones, backbone_of, load_backbone
    from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, Preset
    from corrdit.integrations.diffusers.captures import Capture, capture
    from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance
    from corrdit.integrations.diffusers.layouts import TransformerLayout, register_layout
    from corrdit.integrations.diffusers.motion_transfer import MotionTransfer
    from corrdit.integrations.diffusers.processors import CorrespondenceProcessor
    from corrdit.tracking.options import ReadingPreset


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.integrations.diffusers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
