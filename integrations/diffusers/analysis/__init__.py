"""Analysing how a video diffusion transformer matches frames, on given videos and while it generates."""

from corrdit.integrations.diffusers.analysis.exploration import Exploration, PointAnswer, Setting, explore
from corrdit.integrations.diffusers.analysis.generation import GenerationAnalysis, analyze_generation
from corrdit.integrations.diffusers.analysis.running import analyze_item, finish_analysis
from corrdit.integrations.diffusers.analysis.videos import analyze_video

__all__ = [
    "Exploration",
    "GenerationAnalysis",
    "PointAnswer",
    "Setting",
    "analyze_generation",
    "analyze_item",
    "analyze_video",
    "explore",
    "finish_analysis",
]
