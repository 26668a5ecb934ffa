"""Analysing how a video diffusion transformer matches frames, on given videos and while it generates."""

from corrdit.integrations.diffusers.analysis.videos import analyze_video

__all__ = ["analyze_video"]
