"""Published settings of cross-attention guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from corrdit.integrations.diffusers.layouts import config_of, layout_of


@dataclass(frozen=True)
class GuidancePreset:
    """Settings of cross-attention guidance for one model.

    Args:
        layers: attention layers that lose their cross-frame attention, counted over all blocks.
        scale: guidance scale.
        classifier_free_scale: guidance_scale of the pipeline the results were made with.
        source: where the settings come from.
    """

    layers: tuple[int, ...]
    scale: float = 1.0
    classifier_free_scale: float = 6.0
    source: str = "given"


_DIFFTRACK = "DiffTrack's released cross-attention guidance (arXiv 2506.17220)"
PUBLISHED_GUIDANCE = {
    ("CogVideoXTransformer3DModel", 30, 30): GuidancePreset((13, 17, 21), source=_DIFFTRACK),
    ("CogVideoXTransformer3DModel", 42, 48): GuidancePreset((15, 17, 18), source=_DIFFTRACK),
}
"""By (class of the transformer, attention layers, heads): CogVideoX-2B and 5B."""


def guidance_preset(transformer: torch.nn.Module) -> GuidancePreset | None:
    """The published settings for a model of this shape, None where there are none.

    Raises:
        ValueError: a transformer that is not known.
    """
    layers = len(layout_of(transformer).attention_modules(transformer))
    heads = int(config_of(transformer).num_attention_heads)
    for candidate in type(transformer).__mro__:
        preset = PUBLISHED_GUIDANCE.get((candidate.__name__, layers, heads))
        if preset is not None:
            return preset
    return None
