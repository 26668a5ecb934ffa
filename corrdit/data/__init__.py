"""Videos with exact truth: the generated world and its prompts. Needs torch and numpy only."""

from corrdit.data.prompts import PROMPT_KINDS, describe
from corrdit.data.scene import Scene
from corrdit.data.world import Clip, Flow, Truth, WorldConfig, demo_clip, generate, render

__all__ = [
    "PROMPT_KINDS",
    "Clip",
    "Flow",
    "Scene",
    "Truth",
    "WorldConfig",
    "demo_clip",
    "describe",
    "generate",
    "render",
]
