"""How well the layers, heads and steps of a video diffusion transformer match frames."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "FEATURE_READINGS": "corrdit.analysis.options",
    "PROTOCOLS": "corrdit.analysis.options",
    "AnalysisOptions": "corrdit.analysis.options",
    "AnalysisTable": "corrdit.analysis.table",
    "AnalysisItem": "corrdit.analysis.sources",
    "AnalysisVideo": "corrdit.analysis.sources",
    "Calibration": "corrdit.analysis.calibration",
    "analysis_options": "corrdit.analysis.options",
    "calibrate": "corrdit.analysis.calibration",
    "difftrack_items": "corrdit.analysis.sources",
    "folder_items": "corrdit.analysis.sources",
    "pseudo_tracker": "corrdit.analysis.pseudo_truth",
    "read_difftrack": "corrdit.analysis.dataset",
    "read_results": "corrdit.analysis.results",
    "starting_points": "corrdit.analysis.pseudo_truth",
    "tapvid_items": "corrdit.analysis.sources",
    "world_items": "corrdit.analysis.sources",
    "write_difftrack_video": "corrdit.analysis.dataset",
    "write_prompts": "corrdit.analysis.dataset",
    "write_report": "corrdit.analysis.summary",
}
__all__ = [
    "FEATURE_READINGS",
    "PROTOCOLS",
    "AnalysisItem",
    "AnalysisOptions",
    "AnalysisTable",
    "AnalysisVideo",
    "Calibration",
    "analysis_options",
    "calibrate",
    "difftrack_items",
    "folder_items",
    "pseudo_tracker",
    "read_difftrack",
    "read_results",
    "starting_points",
    "tapvid_items",
    "world_items",
    "write_difftrack_video",
    "write_prompts",
    "write_report",
]

if TYPE_CHECKING:
    from corrdit.analysis.calibration import Calibration, calibrate
    from corrdit.analysis.dataset import read_difftrack, write_difftrack_video, write_prompts
    from corrdit.analysis.options import FEATURE_READINGS, PROTOCOLS, AnalysisOptions, analysis_options
    from corrdit.analysis.pseudo_truth import pseudo_tracker, starting_points
    from corrdit.analysis.results import read_results
    from corrdit.analysis.sources import (
        AnalysisItem,
        AnalysisVideo,
        difftrack_items,
        folder_items,
        tapvid_items,
        world_items,
    )
    from corrdit.analysis.summary import write_report
    from corrdit.analysis.table import AnalysisTable


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
