"""Reading and steering diffusers' video transformers. Importing it does not load diffusers."""

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import available_backbones, backbone_of, load_backbone
from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, Preset
from corrdit.integrations.diffusers.captures import Capture, capture
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.layouts import TransformerLayout, register_layout
from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.transfer import MotionTransfer
from corrdit.integrations.diffusers.named_layout import register_named_grid
from corrdit.integrations.diffusers.processors import CorrespondenceProcessor
from corrdit.integrations.diffusers.text_attention import text_maps
from corrdit.tracking.options import ReadingPreset

__all__ = [
    "Backbone",
    "Capture",
    "CorrespondenceProcessor",
    "CrossAttentionGuidance",
    "GuidancePreset",
    "MotionObjective",
    "MotionTransfer",
    "Preset",
    "ReadingPreset",
    "TransformerLayout",
    "available_backbones",
    "backbone_of",
    "capture",
    "load_backbone",
    "register_layout",
    "register_named_grid",
    "text_maps",
]
