"""Plugging into Lightning: callbacks for anyone's module, and modules and data modules of our own."""

from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule
from corrdit.integrations.lightning.callback import CorrespondenceCallback
from corrdit.integrations.lightning.data_modules import VideoDataModule
from corrdit.integrations.lightning.evaluation import EvaluationModule
from corrdit.integrations.lightning.generation import GenerationModule, PromptDataModule
from corrdit.integrations.lightning.guidance_callback import GuidanceCallback
from corrdit.integrations.lightning.measurement import WorldProbe
from corrdit.integrations.lightning.modules import TrackingModule, tracking_report
from corrdit.integrations.lightning.monitor import CorrespondenceMonitor
from corrdit.integrations.lightning.tapvid_data import TapVidDataModule
from corrdit.integrations.lightning.transfer import TransferDataModule, TransferModule

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
