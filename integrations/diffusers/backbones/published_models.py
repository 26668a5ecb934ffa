"""Models with published settings, and which of them are those of a model of some shape."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, Preset
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.tracking.options import ReadingPreset

PUBLISHED_LAYER_SHARE = 17 / 30
"""Depth of the published layer in CogVideoX-2B; the starting point for models nobody has published a layer for."""


@dataclass(frozen=True)
class PublishedModel:
    """A model with published settings.

    Args:
        hub_id: repository of the weights.
        family: family of the transformer.
        layers: attention layers.
        heads: attention heads.
        dtype: precision of the published results.
        preset: the settings.
    """

    hub_id: str
    family: str
    layers: int
    heads: int
    dtype: str
    preset: Preset


PUBLISHED_NEGATIVE_PROMPT = "bad quality, distortions, unrealistic, distorted image, watermark, signature"

_DITFLOW = TransferSettings(
    blocks=(15,),
    guidance_scale=7.0,
    negative_prompt=PUBLISHED_NEGATIVE_PROMPT,
    injection_blocks=(0,),
    gradient_checkpointing=True,
    size=(480, 720),
    scheduler="CogVideoXDDIMScheduler",
    source="DiTFlow's released code",
)


def _published(
    layer: int, *, guided: tuple[int, ...] | None = None, transfer: TransferSettings | None = None, **reading: Any
) -> Preset:
    return Preset(
        ReadingPreset(layer, height=480, width=720, **reading),
        guidance=GuidancePreset(guided, source="DiffTrack's released cross-attention guidance (arXiv 2506.17220)"),
        transfer=transfer,
        source="DiffTrack's released tracking",
    )


PUBLISHED_MODELS = {
    "cogvideox-2b": PublishedModel(
        "THUDM/CogVideoX-2b",
        "cogvideox",
        30,
        30,
        "float16",
        _published(17, guided=(13, 17, 21), transfer=_DITFLOW),
    ),
    "cogvideox-5b": PublishedModel(
        "THUDM/CogVideoX-5b",
        "cogvideox",
        42,
        48,
        "bfloat16",
        _published(
            17,
            guided=(15, 17, 18),
            transfer=dataclasses.replace(
                _DITFLOW,
                blocks=(20,),
                scheduler="CogVideoXDPMScheduler",
                pipeline_options=(("use_dynamic_cfg", True),),
            ),
        ),
    ),
    "hunyuanvideo": PublishedModel(
        "hunyuanvideo-community/HunyuanVideo",
        "hunyuanvideo",
        60,
        24,
        "bfloat16",
        _published(16, step=29, inference_steps=30),
    ),
}
"""By the short name `load_backbone` takes."""


def published_preset(family: str, layers: int, heads: int) -> Preset | None:
    """The published settings of a model of this shape, None where there are none."""
    for model in PUBLISHED_MODELS.values():
        if (model.family, model.layers, model.heads) == (family, layers, heads):
            return model.preset
    return None


def preset_for(family: str, layers: int, heads: int) -> Preset:
    """The published preset of the model with this shape, or a starting point that says it is one."""
    layer = min(layers - 1, round(PUBLISHED_LAYER_SHARE * layers))
    source = "a starting point at the published depth; nothing is published for this model"
    return published_preset(family, layers, heads) or Preset(ReadingPreset(layer), source=source)


def guidance_preset(transformer: nn.Module) -> GuidancePreset | None:
    """The published settings of guidance for a model of this shape, None where there are none.

    Raises:
        ValueError: a transformer that is not known.
    """
    layout = layout_of(transformer)
    layers, heads = len(layout.attention_modules(transformer)), layout.heads(transformer)
    preset = published_preset(layout.family, layers, heads)
    return None if preset is None or preset.guidance.layers is None else preset.published().guidance


class ShapedModel(Protocol):
    """What says which published settings are a model's: a `Backbone`."""

    layers: int
    heads: int
    preset: Preset

    @property
    def family(self) -> str: ...


def default_layers(backbone: ShapedModel) -> tuple[int, ...]:
    """The layers its preset guides, those published for a model of this shape, or the one that is read."""
    published = published_preset(backbone.family, backbone.layers, backbone.heads)
    for preset in (backbone.preset, published):
        if preset is not None and preset.guidance.layers is not None:
            return preset.guidance.layers
    return (backbone.preset.reading.layer,)
