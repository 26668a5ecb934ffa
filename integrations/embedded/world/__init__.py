"""The generated world: videos from seeds with exact point correspondence, and their prompts."""

from corrdit.integrations.embedded.world.clips import Clip, Flow, Truth, WorldConfig, demo_clip, generate, render
from corrdit.integrations.embedded.world.scene import HELD_OUT_SEEDS, PROMPT_KINDS, Scene, describe

__all__ = [
    "HELD_OUT_SEEDS",
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
