"""Evaluation of point trackers on annotated videos: trackers by name, a result file for each video, tables."""

from corrdit.evaluation.results import EvaluationResults
from corrdit.evaluation.scoring import Outcome, evaluate_video, track_in_parts
from corrdit.evaluation.tracker_tables import TrackerSummary, summarise, write_tables
from corrdit.evaluation.trackers import TRACKER_KINDS, TrackerChoice, chosen_trackers

__all__ = [
    "TRACKER_KINDS",
    "EvaluationResults",
    "Outcome",
    "TrackerChoice",
    "TrackerSummary",
    "chosen_trackers",
    "evaluate_video",
    "summarise",
    "track_in_parts",
    "write_tables",
]
