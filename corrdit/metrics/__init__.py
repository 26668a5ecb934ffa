"""Figures of merit: TAP-Vid point tracking, motion fidelity, and DiffTrack's summary of an analysis."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from corrdit.metrics.motion_fidelity import motion_fidelity
from corrdit.metrics.summary import harmonic_mean
from corrdit.metrics.tapvid import tapvid

__all__ = ["TapVidMetric", "harmonic_mean", "motion_fidelity", "tapvid"]

if TYPE_CHECKING:
    from corrdit.metrics.tapvid_torchmetrics import TapVidMetric


def __getattr__(name: str) -> Any:
    if name == "TapVidMetric":
        value = importlib.import_module("corrdit.metrics.tapvid_torchmetrics").TapVidMetric
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
