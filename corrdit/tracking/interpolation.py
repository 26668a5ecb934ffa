"""Stretching tracks of latent frames over video frames, as DiffTrack's released code does."""

from __future__ import annotations

import numpy as np
import torch

from corrdit.arguments import whole_number


def interpolate_tracks(tracks: torch.Tensor | np.ndarray, frames: int) -> torch.Tensor | np.ndarray:
    """Linear interpolation over time with pixel-centred ends (`align_corners=False`), as DiffTrack released it.

    Video frame t reads latent time (t + 0.5) * F / frames - 0.5, clamped to the first and the last latent frame. For
    13 latent frames and 49 video frames this puts video frame 0 at latent time -0.37: kept for parity only. A codec's
    own map of latent frames to video frames is right where one is known.

    Args:
        tracks: float `[B, F, P, 2]` (batch, latent frame, point, (x, y)).
        frames: number of video frames.

    Returns:
        `[B, frames, P, 2]`, of the kind (tensor or array) and the precision given.

    Raises:
        ValueError: another shape, no frames, or whole numbers in place of real ones.
    """
    frames = whole_number("frames", frames, 1)
    given = torch.as_tensor(tracks)
    if given.ndim != 4 or given.shape[-1] != 2 or given.shape[1] == 0:
        raise ValueError(
            "tracks must have shape [batch, latent frames, points, 2] with at least one latent frame, "
            f"got {list(given.shape)}"
        )
    if not given.is_floating_point():
        raise ValueError(f"tracks must be floating-point numbers, got {given.dtype}")
    latent_frames = given.shape[1]
    precision = torch.promote_types(given.dtype, torch.float32)
    time = (torch.arange(frames, device=given.device, dtype=precision) + 0.5) * (latent_frames / frames) - 0.5
    time = time.clamp(0, latent_frames - 1)
    before = time.floor().long().clamp(max=max(latent_frames - 2, 0))
    after = (before + 1).clamp(max=latent_frames - 1)
    share = (time - before)[None, :, None, None].to(given.dtype)
    stretched = given[:, before] * (1 - share) + given[:, after] * share
    return stretched.numpy() if isinstance(tracks, np.ndarray) else stretched
