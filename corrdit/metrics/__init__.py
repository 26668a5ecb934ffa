"""Figures of merit: TAP-Vid point tracking, motion fidelity, and DiffTrack's summary of an analysis."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corrdit.metrics.motion_fidelity import motion_fidelity
from corrdit.metrics.summary import harmonic_mean
from corrdit.metrics.tapvid import tapvid

_LAZY_ATTRIBUTES = {
    "MatchingHits": "corrdit.metrics.matching",
    "TapVidMetric": "corrdit.metrics.tapvid_torchmetrics",
    "matching_hits": "corrdit.metrics.matching",
}
__all__ = ["MatchingHits", "TapVidMetric", "harmonic_mean", "matching_hits", "motion_fidelity", "tapvid"]

if TYPE_CHECKING:
    from corrdit.metrics.matching import MatchingHits, matching_hits
    from corrdit.metrics.tapvid_torchmetrics import TapVidMetric


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
