"""The definition of every operation in plain PyTorch: score maps are materialised, float64 stays float64.

Slow and large on purpose: the other backends are tested against these functions. Fewer queries are rows of the whole
problem, keys of a shard the whole problem with the other keys removed, fewer key heads the same heads repeated.
"""

from corrdit.reference.attention_mass import attention_mass
from corrdit.reference.frame_local_attention import frame_local_attention
from corrdit.reference.hard_displacement import hard_displacement
from corrdit.reference.match import cost_rows, match
from corrdit.reference.soft_displacement import soft_displacement

__all__ = [
    "attention_mass",
    "cost_rows",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
]
