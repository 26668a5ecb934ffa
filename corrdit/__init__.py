"""corrdit: point correspondence, guidance and motion transfer from the attention of video diffusion transformers.

Public names are resolved on first use, so that `import corrdit` stays light and works where triton, diffusers or
lightning are missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corrdit import moved, pipelines
from corrdit.version import __version__

_LAZY_ATTRIBUTES = {
    "TokenGrid": "corrdit.grid",
    "Tracks": "corrdit.tracking",
    "PointTracker": "corrdit.tracking",
    "CorrespondenceProcessor": "corrdit.integrations.diffusers",
    "CrossAttentionGuidance": "corrdit.integrations.diffusers",
    "MotionObjective": "corrdit.integrations.diffusers",
    "MotionTransfer": "corrdit.integrations.diffusers",
    # By its module: the package attribute of this name is the module once that is imported.
    "capture": "corrdit.integrations.diffusers.captures",
    "backbone_of": "corrdit.integrations.diffusers",
    "load_backbone": "corrdit.integrations.diffusers",
}
_LAZY_MODULES = ("data", "metrics", "motion", "ops", "testing", "tracking", "video", "visualization")

MOVED = {
    "corrdit.analysis.options": "corrdit.analysis.protocols",
    "corrdit.analysis.pseudo_truth": "corrdit.tracking.pseudo_truth",
    "corrdit.analysis:world_items": "corrdit.integrations.embedded.world.analysis_items:world_items",
    "corrdit.data.prompts": "corrdit.integrations.embedded.world.scene",
    "corrdit.data.sampling": "corrdit.integrations.embedded.world.clips",
    "corrdit.data.scene": "corrdit.integrations.embedded.world.scene",
    "corrdit.data.world": "corrdit.integrations.embedded.world.clips",
    **{
        f"corrdit.data:{name}": f"corrdit.integrations.embedded.world:{name}"
        for name in (
            "PROMPT_KINDS", "Clip", "Flow", "Scene", "Truth", "WorldConfig", "demo_clip", "describe", "generate",
            "render",
        )
    },
    "corrdit.integrations.diffusers.embedded.evaluation": "corrdit.integrations.embedded.training.evaluation",
    "corrdit.integrations.diffusers.embedded": "corrdit.integrations.embedded",
    "corrdit.integrations.lightning.model_placement": "corrdit.integrations.diffusers.placement",
    "corrdit.integrations.diffusers.guidance.presets": "corrdit.integrations.diffusers.backbones.presets",
    **{
        f"corrdit.integrations.diffusers.backbones.presets:{name}":
            f"corrdit.integrations.diffusers.backbones.published_models:{name}"
        for name in (
            "PUBLISHED_MODELS", "PublishedModel", "default_layers", "guidance_preset", "preset_for", "published_preset",
        )
    },
    "corrdit.integrations.diffusers.motion_transfer.presets": "corrdit.integrations.diffusers.motion_transfer.transfer",
    "corrdit.integrations.diffusers.motion_transfer.settings": "corrdit.integrations.diffusers.transfer_settings",
    "corrdit.integrations.lightning.muon": "corrdit.integrations.embedded.training.muon",
    "corrdit.integrations.lightning.recipes": "corrdit.integrations.embedded.training.recipe",
    "corrdit.integrations.lightning.training": "corrdit.integrations.embedded.training.module",
    "corrdit.tracking.geometry": "corrdit.geometry",
    **{
        f"corrdit.testing.{name}": f"corrdit.integrations.diffusers.testing.{name}"
        for name in ("conformance", "subject", "tiny_models")
    },
}  # fmt: skip
"""New names by old ones ("module:attribute" for single names); the old ones work until 0.3, with a warning."""

moved.install(MOVED)

__all__ = [
    "CorrespondenceProcessor",
    "CrossAttentionGuidance",
    "MotionObjective",
    "MotionTransfer",
    "PointTracker",
    "TokenGrid",
    "Tracks",
    "__version__",
    "backbone_of",
    "capture",
    "data",
    "load_backbone",
    "metrics",
    "motion",
    "ops",
    "testing",
    "tracking",
    "video",
    "visualization",
]

if TYPE_CHECKING:
    from corrdit import data, metrics, motion, ops, testing, tracking, video, visualization
    from corrdit.grid import TokenGrid
    from corrdit.integrations.diffusers import (
        CorrespondenceProcessor,
        CrossAttentionGuidance,
        MotionObjective,
        MotionTransfer,
        backbone_of,
        capture,
        load_backbone,
    )
    from corrdit.tracking import PointTracker, Tracks


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"corrdit.{name}")
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit' has no attribute {name!r}")


def _backbone_of(pipe: object) -> object:
    return __getattr__("backbone_of")(pipe)


pipelines.make_backbones_with(_backbone_of)


def __dir__() -> list[str]:
    return sorted(__all__)
