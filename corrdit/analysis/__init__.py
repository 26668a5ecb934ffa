"""How well the layers, heads and steps of a video diffusion transformer match frames."""

from corrdit.analysis.calibration import Calibration, calibrate
from corrdit.analysis.dataset import read_difftrack, write_difftrack_video, write_prompts
from corrdit.analysis.html_report import write_report
from corrdit.analysis.protocols import FEATURE_READINGS, PROTOCOLS, AnalysisOptions, analysis_options
from corrdit.analysis.released_scores import released_scores
from corrdit.analysis.results import read_results
from corrdit.analysis.sources import (
    AnalysisItem,
    AnalysisVideo,
    GeneratedItem,
    difftrack_items,
    folder_items,
    prompt_items,
    regenerated_items,
    tapvid_items,
)
from corrdit.analysis.table import AnalysisTable
from corrdit.tracking.pseudo_truth import pseudo_tracker, starting_points

__all__ = [
    "FEATURE_READINGS",
    "PROTOCOLS",
    "AnalysisItem",
    "AnalysisOptions",
    "AnalysisTable",
    "AnalysisVideo",
    "Calibration",
    "GeneratedItem",
    "analysis_options",
    "calibrate",
    "difftrack_items",
    "folder_items",
    "prompt_items",
    "pseudo_tracker",
    "read_difftrack",
    "read_results",
    "regenerated_items",
    "released_scores",
    "starting_points",
    "tapvid_items",
    "write_difftrack_video",
    "write_prompts",
    "write_report",
]
