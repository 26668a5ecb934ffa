"""The operations on Triton kernels, one function each; importing them loads triton."""

from corrdit.kernels.displacement.soft import soft_displacement
from corrdit.kernels.frame_local.attention import frame_local_attention
from corrdit.kernels.matching.costs import cost_rows
from corrdit.kernels.matching.hard import hard_displacement
from corrdit.kernels.matching.mass import attention_mass
from corrdit.kernels.matching.match import match
from corrdit.problem import float32_precision

__all__ = [
    "attention_mass",
    "cost_rows",
    "float32_precision",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
]
