"""The rows of `tracking.py`: our tracker with one option changed, and the trackers it has to beat."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from experiment import Record

from corrdit import PointTracker, Tracks
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.feature_backbone import FeatureBackbone
from corrdit.tracking.baselines import nearest_patches, standing_still
from corrdit.tracking.pseudo_truth import lucas_kanade

Track = Callable[[np.ndarray, np.ndarray], Tracks]


@dataclass(frozen=True)
class Variant:
    """A row: a tracker of `TRACKERS` with options."""

    name: str
    kind: str
    options: Record


def _features(backbone: Backbone, options: Record) -> Track:
    given = dict(options)
    read = FeatureBackbone(backbone, given.pop("feature"))
    layer = given.pop("layer", backbone.preset.reading.layer)
    return PointTracker(read, layer=layer, head_weights=(), heads="logits", **given).track


def _still(backbone: Backbone, options: Record) -> Track:
    return lambda video, queries: standing_still(queries, len(video))


TRACKERS: dict[str, Callable[[Backbone, Record], Track]] = {
    "tracker": lambda backbone, options: PointTracker(backbone, **options).track,
    "features": _features,
    "patches": lambda backbone, options: nearest_patches,
    "still": _still,
    "lucas-kanade": lambda backbone, options: lucas_kanade,
}


def released_temperature(backbone: Backbone) -> float:
    """The released tracking code scales products by the number of heads to the -1/2 in place of their size."""
    config = backbone.transformer.config
    return float((config.attention_head_dim / config.num_attention_heads) ** 0.5)


def variants(backbone: Backbone) -> list[Variant]:
    """All rows for a backbone; its preset's own options for the tracker are the default that rows change."""
    own = dict(backbone.preset.described()["tracking"])
    mean = {**own, "layers": (), "layer": backbone.preset.reading.layer, "head_weights": ()}
    mean.pop("layers")
    published = {"preset": "published", "temperature": released_temperature(backbone)}
    filtered = [(f"low-pass {spread:g}", {"low_pass": spread}) for spread in (0.4, 0.8)]
    changed: list[tuple[str, Record]] = [
        ("default", {}),
        ("mean over all heads of one layer", {**mean, "heads": "logits"}),
        ("mean of softmaxes over its heads", {**mean, "heads": "probabilities"}),
        ("mean of softmaxes, heads as default", {"heads": "probabilities"}),
        ("median over heads of positions", {"combine": "median"}),
        ("temperature 4", {"temperature": 4.0}),
        *filtered,
        ("two timesteps", {"steps": (-1, -4)}),
        ("noisy latents", {"noise": True}),
        ("noisy latents, step -4", {"noise": True, "step": -4}),
        ("inverted latents", {"inversion": "ddim"}),
        ("inverted latents, step -4", {"inversion": "ddim", "step": -4}),
        ("one direction", {"bidirectional": False}),
        ("no sub-token refinement", {"refine": 0}),
        ("refinement radius 2", {"refine": 2}),
        ("every frame by itself", {"path_spread": 0.0}),
        ("no crops", {"crops": ()}),
        ("crops at 1/2", {"crops": (0.5,)}),
        ("crops at 1/2 and 1/4", {"crops": (0.5, 0.25)}),
        ("visibility by the whole frame only", {"crop_tolerance": 100.0}),
        ("everything visible", {"visibility": "all"}),
        ("published procedure", published),
        ("published, frames not 256 x 256 first", {**published, "resize_first": None}),
        ("published, products by head size", {"preset": "published"}),
    ]
    rows = [Variant(name, "tracker", options) for name, options in changed]
    rows += [
        Variant(f"features, {feature}", "features", {"feature": feature, "temperature": 8.0, "bidirectional": True})
        for feature in ("attention output", "projected output")
    ]
    rows += [Variant("nearest patch of 7 x 7", "patches", {}), Variant("standing still", "still", {})]
    if importlib.util.find_spec("cv2") is not None:
        rows.append(Variant("Lucas-Kanade", "lucas-kanade", {}))
    return rows
