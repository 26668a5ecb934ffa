"""The rows of `tracking.py`: our tracker with one option changed, and the trackers it has to beat."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from corrdit import PointTracker, Tracks
from corrdit.analysis.pseudo_truth import lucas_kanade
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.tracking.baselines import nearest_patches, standing_still

Track = Callable[[Any, Any], Tracks]


@dataclass(frozen=True)
class Variant:
    """A row: a tracker of `TRACKERS` with options."""

    name: str
    kind: str
    options: Mapping[str, Any]


class FeatureBackbone:
    """A backbone whose queries and keys are both the normalised output of an attention layer, one head.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        feature: "attention output" (before the projection) or "projected output".
    """

    heads = 1

    def __init__(self, backbone: Any, feature: str) -> None:
        self.backbone, self.feature = backbone, feature

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def forward(self, latents: Tensor, timestep: float, operations: Mapping[int, Callable[..., Any]]) -> dict[int, Any]:
        grid = self.backbone.grid(latents.shape[0], *latents.shape[-2:]).without_text()
        results: dict[int, Any] = {}

        def deliver(layer: int, name: str, result: Any) -> None:
            if name == self.feature:
                results[layer] = operations[layer](result, result, grid, None)

        reading_forward(
            self.backbone,
            latents,
            timestep,
            layers=tuple(operations),
            operation=lambda q, k, grid, key_mask: q.new_zeros(1),
            feature_operation=_as_head,
            deliver=deliver,
        )
        return results


def _as_head(features: Tensor, grid: Any) -> Tensor:
    """`[1, 1, N, C]` with products between -sqrt(C) and sqrt(C)."""
    return F.normalize(features.float(), dim=-1)[:, None] * features.shape[-1] ** 0.25


def _features(backbone: Any, options: Mapping[str, Any]) -> Track:
    given = dict(options)
    read = FeatureBackbone(backbone, given.pop("feature"))
    layer = given.pop("layer", backbone.preset.layer)
    return PointTracker(read, layer=layer, head_weights=(), heads="logits", **given).track


def _still(backbone: Any, options: Mapping[str, Any]) -> Track:
    return lambda video, queries: standing_still(queries, len(video))


TRACKERS: dict[str, Callable[[Any, Mapping[str, Any]], Track]] = {
    "tracker": lambda backbone, options: PointTracker(backbone, **options).track,
    "features": _features,
    "patches": lambda backbone, options: nearest_patches,
    "still": _still,
    "lucas-kanade": lambda backbone, options: lucas_kanade,
}


def variants(backbone: Any) -> list[Variant]:
    """All rows for a backbone; its preset's own options for the tracker are the default that rows change."""
    own = dict(getattr(backbone.preset, "tracking", None) or {})
    mean = {**own, "layers": (), "layer": backbone.preset.layer, "head_weights": ()}
    mean.pop("layers")
    filtered = [(f"low-pass {spread:g}", {"low_pass": spread}) for spread in (0.4, 0.8)]
    changed: list[tuple[str, dict[str, Any]]] = [
        ("default", {}),
        ("mean over all heads of one layer", {**mean, "heads": "logits"}),
        ("mean of softmaxes over its heads", {**mean, "heads": "probabilities"}),
        ("mean of softmaxes, heads as default", {"heads": "probabilities"}),
        ("median over heads of positions", {"combine": "median"}),
        ("temperature 1", {"temperature": 1.0}),
        *filtered,
        ("two timesteps", {"steps": (-1, -4)}),
        ("noisy latents", {"noise": True}),
        ("noisy latents, step -4", {"noise": True, "step": -4}),
        ("one direction", {"bidirectional": False}),
        ("no sub-token refinement", {"refine": 0}),
        ("refinement radius 2", {"refine": 2}),
        ("every frame by itself", {"path_spread": 0.0}),
        ("no crops", {"crops": ()}),
        ("crops at 1/2", {"crops": (0.5,)}),
        ("crops at 1/2 and 1/4", {"crops": (0.5, 0.25)}),
        ("visibility by the whole frame only", {"crop_tolerance": 100.0}),
        ("everything visible", {"visibility": "all"}),
        ("published procedure", {"preset": "published"}),
        ("published, frames not 256 x 256 first", {"preset": "published", "resize_first": None}),
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
