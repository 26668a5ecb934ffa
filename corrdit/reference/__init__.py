"""The definition of every operation in plain PyTorch: score maps are materialised, float64 stays float64.

Slow and large on purpose: the other backends are tested against these functions.
"""

from corrdit.reference.attention_mass import attention_mass
from corrdit.reference.cost_rows import cost_rows
from corrdit.reference.frame_local_attention import frame_local_attention
from corrdit.reference.hard_displacement import hard_displacement
from corrdit.reference.match import match
from corrdit.reference.soft_displacement import soft_displacement

__all__ = [
    "attention_mass",
    "cost_rows",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
]
