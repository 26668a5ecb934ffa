"""How well the layers, heads and steps of a video diffusion transformer match frames."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "FEATURE_READINGS": "corrdit.analysis.options",
    "PROTOCOLS": "corrdit.analysis.options",
    "AnalysisOptions": "corrdit.analysis.options",
    "AnalysisTable": "corrdit.analysis.table",
    "analysis_options": "corrdit.analysis.options",
}
__all__ = ["FEATURE_READINGS", "PROTOCOLS", "AnalysisOptions", "AnalysisTable", "analysis_options"]

if TYPE_CHECKING:
    from corrdit.analysis.options import FEATURE_READINGS, PROTOCOLS, AnalysisOptions, analysis_options
    from corrdit.analysis.table import AnalysisTable


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
