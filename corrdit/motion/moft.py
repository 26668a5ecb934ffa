"""Motion features: the channels of a transformer's features that carry motion.

Xiao et al., "Video Diffusion Models are Training-free Motion Interpreter and Controller" (2024), in the form DiTFlow
released for its comparison.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from corrdit.motion.smm import checked_region


def moft_channels(reference: torch.Tensor, fraction: float, *, region: torch.Tensor | None = None) -> torch.Tensor:
    """The channels with the largest weight in the first principal component of the time-centred features.

    Args:
        reference: `[F, C, h, w]`, features of one layer over at least two frames.
        fraction: share of the channels to keep, above 0 and at most 1; rounded down to whole channels, at least one.
            DiTFlow uses 0.04.
        region: bool `[F, h, w]`, the places that count; None for all.

    Returns:
        int64 `[max(1, floor(fraction * C))]`, ascending.

    Raises:
        ValueError: another shape, fewer than two frames, NaN, features that do not change over time, a fraction out of
            range.
    """
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction!r}")
    features = _time_centred("reference", reference).detach().to(torch.float64)
    channels = features.shape[1]
    samples = features.movedim(1, -1)
    samples = samples.reshape(-1, channels) if region is None else samples[checked_region(region, features)]
    covariance = samples.T @ samples
    if not bool(covariance.diagonal().sum() > 0):
        raise ValueError("reference does not change over time, so no channel carries motion")
    component = torch.linalg.eigh(covariance).eigenvectors[:, -1].abs()
    kept = max(1, int(channels * fraction + 1e-9))
    return component.topk(kept).indices.sort().values


def moft_loss(
    target: torch.Tensor,
    reference: torch.Tensor,
    channels: torch.Tensor,
    *,
    region: torch.Tensor | None = None,
) -> torch.Tensor:
    """One minus the mean cosine between the time-centred features of two videos over the motion channels.

    Args:
        target: `[F, C, h, w]`, features of the video being made; the loss is differentiable in them.
        reference: `[F, C, h, w]`, features of the video whose motion is wanted.
        channels: int64 `[K]`, as `moft_channels` gives them.
        region: bool `[F, h, w]`, the places whose cosines are averaged; None for all.

    Returns:
        Scalar, 0 (same motion) to 2; float32, or float64 for float64 features.

    Raises:
        ValueError: shapes that differ, fewer than two frames, NaN, or channels out of range.
    """
    target, reference = _time_centred("target", target), _time_centred("reference", reference)
    if target.shape != reference.shape:
        raise ValueError(
            f"target and reference must have the same shape, got {list(target.shape)} and {list(reference.shape)}"
        )
    channels = torch.as_tensor(channels, device=target.device)
    if channels.ndim != 1 or channels.numel() == 0 or channels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"channels must be a list of channel indices, got {channels.dtype} {list(channels.shape)}")
    if int(channels.min()) < 0 or int(channels.max()) >= target.shape[1]:
        raise ValueError(
            f"channels must be from 0 to {target.shape[1] - 1}, got {int(channels.min())} to {int(channels.max())}"
        )
    reference = reference.to(target)
    cosine = functional.cosine_similarity(target[:, channels], reference[:, channels], dim=1)
    return 1 - (cosine if region is None else cosine[checked_region(region, target)]).mean()


def _time_centred(name: str, features: torch.Tensor) -> torch.Tensor:
    """Features minus their mean over time, in float32 or float64."""
    features = torch.as_tensor(features)
    if features.ndim != 4 or features.shape[0] < 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point features [frames, channels, height, width] of at least two frames, "
            f"got {features.dtype} {list(features.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} holds numbers that are NaN or infinite")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features - features.mean(dim=0, keepdim=True)
