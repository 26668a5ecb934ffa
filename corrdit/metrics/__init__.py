"""Figures of merit: TAP-Vid point tracking, motion fidelity, and DiffTrack's summary of an analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corrdit.metrics.harmonic import harmonic_mean
from corrdit.metrics.matching import MatchingHits, matching_hits
from corrdit.metrics.motion_fidelity import motion_fidelity
from corrdit.metrics.tapvid import tapvid

if TYPE_CHECKING:
    from corrdit.metrics.tapvid_torchmetrics import TapVidMetric

__all__ = ["MatchingHits", "TapVidMetric", "harmonic_mean", "matching_hits", "motion_fidelity", "tapvid"]


def __getattr__(name: str) -> object:
    if name == "TapVidMetric":
        from corrdit.metrics.tapvid_torchmetrics import TapVidMetric  # torchmetrics takes seconds to import

        return TapVidMetric
    raise AttributeError(f"module 'corrdit.metrics' has no attribute {name!r}")
