"""Frames of a video as a codec takes them, and as a transformer is conditioned on them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def prepared_frames(
    video: np.ndarray | torch.Tensor,
    size: tuple[int | None, int | None],
    *,
    stride: tuple[int, int],
    name: str,
    first: tuple[int, int] | None = None,
    antialias: bool = True,
) -> torch.Tensor:
    """Video frames float `[T, 3, height, width]` in -1..1 on the CPU, resized bilinearly and not rounded.

    Args:
        video: uint8 `[T, H, W, 3]`.
        size: (height, width) to resize to; None for the video's own.
        stride: (dy, dx) pixels a token spans.
        name: of the model, for messages.
        first: (height, width) to which frames are resized before that; None for none.
        antialias: whether with antialiasing.

    Raises:
        ValueError: not such a video, or a size that is no whole number of tokens.
    """
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"video must be uint8 [T, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    height, width = size[0] or frames.shape[1], size[1] or frames.shape[2]
    for side, pixels, step in zip(("height", "width"), (height, width), stride, strict=True):
        if pixels % step:
            raise ValueError(
                f"{side} {pixels} is not a multiple of {step}, the pixels a token of {name} spans; give "
                f"{side}={max(step, round(pixels / step) * step)}"
            )
    images = frames.permute(0, 3, 1, 2)
    resized = []
    for image in images.split(1):
        image = image.float()
        for wanted in ((height, width),) if first is None else (first, (height, width)):
            if tuple(image.shape[2:]) != tuple(wanted):
                image = F.interpolate(image, tuple(wanted), mode="bilinear", antialias=antialias)
        resized.append(image)
    return torch.cat(resized).clamp(0, 255) / 127.5 - 1


def conditioning_latents(image: torch.Tensor, latents: torch.Tensor, *, frames_per_token: int) -> torch.Tensor:
    """Latents a transformer is conditioned on, `[B, 1 or F, C, h, w]` as the codec counts frames.

    Args:
        image: `[1 or B, frames_per_token or F, C, h, w]`; the first of the latents that one token joins stands for one
            frame of tokens.
        latents: `[B, F, C, h, w]`, the noisy ones.
        frames_per_token: latents joined in a token.

    Raises:
        ValueError: other numbers of frames or samples, or another size.
    """
    one = image.shape[1] == frames_per_token
    batch, frames = len(latents), latents.shape[1]
    fits = len(image) in (1, batch) and (one or image.shape[1] == frames) and image.shape[2:] == latents.shape[2:]
    if not fits:
        raise ValueError(
            f"image must be latents of one frame or of all {frames // frames_per_token}, of the size of the noisy ones "
            f"{list(latents.shape)}, got {list(image.shape)}"
        )
    return (image[:, :1] if one else image).expand(batch, -1, -1, -1, -1)
