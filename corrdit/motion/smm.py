"""Spatial marginal mean: what moves, as the change over time of a layer's features averaged over space.

Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (2024), equations 5 to 7.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.arguments import choice

SMM_LOSSES = ("paper", "released")


def smm_loss(target: Tensor, reference: Tensor, *, variant: str = "paper", region: Tensor | None = None) -> Tensor:
    """Difference between two videos in how their spatial mean features differ between frames.

    Args:
        target: `[F, C, h, w]`, features of the video being made; the loss is differentiable in them.
        reference: `[F, C, h, w]`, features of the video whose motion is wanted.
        variant: "paper" is the squared norm of the difference between the pairwise differences of frames, over all
            pairs. "released" is DiTFlow's code: one minus the mean cosine, over the frames, of the differences to each
            frame in turn, where the target's differences are taken to the *reference's* frame.
        region: bool `[F, h, w]`, the places that are averaged over; frames without one are left out. None for all.

    Returns:
        Scalar; float32, or float64 for float64 features.

    Raises:
        ValueError: shapes that differ or are not `[F, C, h, w]` with at least two frames, an unknown variant, or a
            region in fewer than two frames.
    """
    choice("variant", variant, SMM_LOSSES)
    if target.shape != reference.shape or target.ndim != 4 or target.shape[0] < 2:
        raise ValueError(
            "target and reference must be features [frames, channels, height, width] of one shape with at least two "
            f"frames, got {list(target.shape)} and {list(reference.shape)}"
        )
    dtype = torch.promote_types(target.dtype, torch.float32)
    # [F, C] each
    features = (target.to(dtype), reference.to(target.device).to(dtype))
    mean, wanted = (_spatial_mean(entry, region) for entry in features)
    wanted_change = wanted[None] - wanted[:, None]
    if variant == "paper":
        return (mean[None] - mean[:, None] - wanted_change).square().sum()
    change = mean[None] - wanted[:, None]
    return 1 - functional.cosine_similarity(change, wanted_change, dim=1).mean()


def _spatial_mean(features: Tensor, region: Tensor | None) -> Tensor:
    """`[F, C]`, of the frames that have a place in the region."""
    if region is None:
        return features.mean(dim=(-1, -2))
    inside = checked_region(region, features)
    used = inside.any(-1).any(-1)
    if int(used.sum()) < 2:
        raise ValueError(
            "the region is in fewer than two frames, so nothing changes over time in it; give a larger one"
        )
    weights = inside[used].unsqueeze(1).to(features.dtype)
    return (features[used] * weights).sum((-1, -2)) / weights.sum((-1, -2))


def checked_region(region: Tensor, features: Tensor) -> Tensor:
    """A region of features `[F, C, h, w]`, bool `[F, h, w]` on their device.

    Raises:
        ValueError: another shape or type, or no place in it.
    """
    shape = (features.shape[0], *features.shape[2:])
    if not isinstance(region, Tensor) or region.dtype != torch.bool or tuple(region.shape) != shape:
        given = f"{region.dtype} {list(region.shape)}" if isinstance(region, Tensor) else type(region).__name__
        raise ValueError(f"region must be bool {list(shape)} (frame, row, column), got {given}")
    if not bool(region.any()):
        raise ValueError("region holds no place; give one with at least one")
    return region.to(features.device)
