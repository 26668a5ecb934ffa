"""Videos with truth: the generated world and its prompts, and TAP-Vid's files. Needs torch and numpy only."""

from corrdit.data.prompts import PROMPT_KINDS, describe
from corrdit.data.scene import Scene
from corrdit.data.tapvid import TapVidSample, TapVidVideo, read_tapvid
from corrdit.data.tapvid_set import TapVidEntry, TapVidSet
from corrdit.data.tapvid_writing import write_tapvid, write_tapvid_shards
from corrdit.data.world import Clip, Flow, Truth, WorldConfig, demo_clip, generate, render

__all__ = [
    "PROMPT_KINDS",
    "Clip",
    "Flow",
    "Scene",
    "TapVidEntry",
    "TapVidSample",
    "TapVidSet",
    "TapVidVideo",
    "Truth",
    "WorldConfig",
    "demo_clip",
    "describe",
    "generate",
    "read_tapvid",
    "render",
    "write_tapvid",
    "write_tapvid_shards",
]
