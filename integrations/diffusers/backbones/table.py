"""The families of transformers that can be read by themselves: one row each."""

from __future__ import annotations

from corrdit.integrations.diffusers.backbones.allegro import AllegroBackbone
from corrdit.integrations.diffusers.backbones.anyflow import AnyFlowBackbone
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.chronoedit import ChronoEditBackbone
from corrdit.integrations.diffusers.backbones.cogvideox import CogVideoXBackbone
from corrdit.integrations.diffusers.backbones.consisid import ConsisIDBackbone
from corrdit.integrations.diffusers.backbones.cosmos import CosmosBackbone
from corrdit.integrations.diffusers.backbones.cosmos3 import Cosmos3Backbone
from corrdit.integrations.diffusers.backbones.easyanimate import EasyAnimateBackbone
from corrdit.integrations.diffusers.backbones.hunyuanvideo import HunyuanVideoBackbone
from corrdit.integrations.diffusers.backbones.hunyuanvideo15 import HunyuanVideo15Backbone
from corrdit.integrations.diffusers.backbones.kandinsky5 import Kandinsky5Backbone
from corrdit.integrations.diffusers.backbones.kandinsky6 import Kandinsky6Backbone
from corrdit.integrations.diffusers.backbones.ltx import LTXBackbone
from corrdit.integrations.diffusers.backbones.ltx2 import LTX2Backbone
from corrdit.integrations.diffusers.backbones.mochi import MochiBackbone
from corrdit.integrations.diffusers.backbones.motifvideo import MotifVideoBackbone
from corrdit.integrations.diffusers.backbones.skyreelsv2 import SkyReelsV2Backbone
from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.backbones.wananimate import WanAnimateBackbone
from corrdit.integrations.diffusers.backbones.wanvace import WanVACEBackbone
from corrdit.integrations.diffusers.layouts import FAMILY_LAYOUTS

BACKBONES: tuple[type[Backbone], ...] = (
    AllegroBackbone,
    AnyFlowBackbone,
    ChronoEditBackbone,
    CogVideoXBackbone,
    ConsisIDBackbone,
    CosmosBackbone,
    Cosmos3Backbone,
    EasyAnimateBackbone,
    HunyuanVideoBackbone,
    HunyuanVideo15Backbone,
    Kandinsky5Backbone,
    Kandinsky6Backbone,
    LTXBackbone,
    LTX2Backbone,
    MochiBackbone,
    MotifVideoBackbone,
    SkyReelsV2Backbone,
    WanBackbone,
    WanAnimateBackbone,
    WanVACEBackbone,
)
CAPTURED_ALONE = {
    "MiniMaxH3Transformer3DModel": "diffusers runs it by a modular pipeline alone, which is not supported; `capture` "
    "reads its transformer"
}
"""Why transformers with a layout have no backbone."""
FAMILIES = {
    transformer: backbone
    for transformer, layout in FAMILY_LAYOUTS.items()
    for backbone in BACKBONES
    if backbone.layout is layout
}
"""Backbone by the transformer's class name."""
