"""Spatial marginal mean: what moves, as the change over time of a layer's features averaged over space.

Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (2024), equations 5 to 7.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.arguments import choice

SMM_LOSSES = ("paper", "released")


def smm_loss(target: Tensor, reference: Tensor, *, variant: str = "paper") -> Tensor:
    """Difference between two videos in how their spatial mean features differ between frames.

    Args:
        target: `[F, C, h, w]`, features of the video being made; the loss is differentiable in them.
        reference: `[F, C, h, w]`, features of the video whose motion is wanted.
        variant: "paper" is the squared norm of the difference between the pairwise differences of frames, over all
            pairs. "released" is DiTFlow's code: one minus the mean cosine, over the frames, of the differences to each
            frame in turn, where the target's differences are taken to the *reference's* frame.

    Returns:
        Scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: shapes that differ or are not `[F, C, h, w]` with at least two frames, or an unknown variant.
    """
    choice("variant", variant, SMM_LOSSES)
    if target.shape != reference.shape or target.ndim != 4 or target.shape[0] < 2:
        raise ValueError(
            "target and reference must be features [frames, channels, height, width] of one shape with at least two "
            f"frames, got {list(target.shape)} and {list(reference.shape)}"
        )
    dtype = torch.promote_types(target.dtype, torch.float32)
    # [F, C] each
    mean, wanted = (features.to(dtype).mean(dim=(-1, -2)) for features in (target, reference.to(target.device)))
    wanted_change = wanted[None] - wanted[:, None]
    if variant == "paper":
        return (mean[None] - mean[:, None] - wanted_change).square().sum()
    change = mean[None] - wanted[:, None]
    return 1 - functional.cosine_similarity(change, wanted_change, dim=1).mean()
