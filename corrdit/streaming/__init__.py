"""Every operation in plain PyTorch on any device, in pieces that stay under a memory budget."""

from corrdit.streaming.attention_mass import attention_mass
from corrdit.streaming.frame_local_attention import frame_local_attention
from corrdit.streaming.hard_displacement import hard_displacement
from corrdit.streaming.match import cost_rows, match
from corrdit.streaming.soft_displacement import soft_displacement
from corrdit.streaming.soft_displacement_error import soft_displacement_error

__all__ = [
    "attention_mass",
    "cost_rows",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
    "soft_displacement_error",
]
