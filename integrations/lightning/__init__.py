"""Plugging into Lightning: callbacks for anyone's module, and modules and data modules of our own.

Names are resolved on first use, so that importing this package does not load lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "AnalysisDataModule": "corrdit.integrations.lightning.analysis",
    "AnalysisModule": "corrdit.integrations.lightning.analysis",
    "CorrespondenceCallback": "corrdit.integrations.lightning.callback",
    "CorrespondenceMonitor": "corrdit.integrations.lightning.monitor",
    "EvaluationModule": "corrdit.integrations.lightning.evaluation",
    "GenerationModule": "corrdit.integrations.lightning.generation",
    "GuidanceCallback": "corrdit.integrations.lightning.guidance_callback",
    "PromptDataModule": "corrdit.integrations.lightning.generation",
    "TapVidDataModule": "corrdit.integrations.lightning.tapvid_data",
    "TrackingModule": "corrdit.integrations.lightning.modules",
    "TransferDataModule": "corrdit.integrations.lightning.transfer",
    "TransferModule": "corrdit.integrations.lightning.transfer",
    "VideoDataModule": "corrdit.integrations.lightning.data_modules",
    "WorldProbe": "corrdit.integrations.lightning.probe",
    "tracking_report": "corrdit.integrations.lightning.modules",
}
__all__ = [
    "AnalysisDataModule",
    "AnalysisModule",
    "CorrespondenceCallback",
    "CorrespondenceMonitor",
    "EvaluationModule",
    "GenerationModule",
    "GuidanceCallback",
    "PromptDataModule",
    "TapVidDataModule",
    "TrackingModule",
    "TransferDataModule",
    "TransferModule",
    "VideoDataModule",
    "WorldProbe",
    "tracking_report",
]

if TYPE_CHECKING:
    from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule
    from corrdit.integrations.lightning.callback import CorrespondenceCallback
    from corrdit.integrations.lightning.data_modules import VideoDataModule
    from corrdit.integrations.lightning.evaluation import EvaluationModule
    from corrdit.integrations.lightning.generation import GenerationModule, PromptDataModule
    from corrdit.integrations.lightning.guidance_callback import GuidanceCallback
    from corrdit.integrations.lightning.modules import TrackingModule, tracking_report
    from corrdit.integrations.lightning.monitor import CorrespondenceMonitor
    from corrdit.integrations.lightning.probe import WorldProbe
    from corrdit.integrations.lightning.tapvid_data import TapVidDataModule
    from corrdit.integrations.lightning.transfer import TransferDataModule, TransferModule


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.integrations.lightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
