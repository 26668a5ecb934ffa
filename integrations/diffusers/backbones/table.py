"""The families of transformers that can be read by themselves: one row each."""

from __future__ import annotations

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.cogvideox import CogVideoXBackbone
from corrdit.integrations.diffusers.backbones.hunyuanvideo import HunyuanVideoBackbone
from corrdit.integrations.diffusers.backbones.ltx import LTXBackbone
from corrdit.integrations.diffusers.backbones.mochi import MochiBackbone
from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.layouts import FAMILY_LAYOUTS

BACKBONES: tuple[type[Backbone], ...] = (
    CogVideoXBackbone,
    HunyuanVideoBackbone,
    LTXBackbone,
    MochiBackbone,
    WanBackbone,
)
FAMILIES = {
    transformer: backbone
    for transformer, layout in FAMILY_LAYOUTS.items()
    for backbone in BACKBONES
    if backbone.layout is layout
}
"""Backbone by the transformer's class name."""
