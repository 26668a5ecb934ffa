"""Queries and keys without what disturbs matching: smoothed over the token grid, or without some of their channels.

HeFT, "Denoise to Track" (arXiv 2512.04619), finds that a head's low frequencies carry the correspondence. Its released
code means those of the rotary embedding: it leaves out the channels of each axis that turn fastest
(`without_channels`). The mean over neighbouring tokens (`low_pass`) is our own reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.grid import TokenGrid


def without_channels(tokens: Tensor, left_out: Sequence[int]) -> Tensor:
    """`[..., D]` without the channels of these numbers.

    Raises:
        ValueError: a channel that a head does not have, or none that is left.
    """
    if not left_out:
        return tokens
    channels = tokens.shape[-1]
    if max(left_out) >= channels or min(left_out) < 0 or len(set(left_out)) >= channels:
        raise ValueError(f"channels_out must be some of the channels 0 to {channels - 1} of a head, got {left_out}")
    kept = [channel for channel in range(channels) if channel not in set(left_out)]
    return tokens[..., kept]


def low_pass(tokens: Tensor, grid: TokenGrid, spread: float) -> Tensor:
    """Gaussian mean over the neighbours of each token in its own frame, every channel by itself.

    In frequency a Gaussian again, with deviation `1 / (2 pi spread)` cycles a token. At the border the weights of the
    neighbours that are there add up to one, so that nothing is taken from beyond it.

    Args:
        tokens: `[B, H, N, D]`, the video tokens of `grid` (which has no text).
        grid: frames and tokens of a frame.
        spread: standard deviation in tokens; 0 leaves everything as it is.

    Returns:
        `[B, H, N, D]` in the dtype of `tokens`.

    Raises:
        ValueError: a negative or infinite spread, or another number of tokens than the grid has.
    """
    if not 0 <= spread < float("inf"):
        raise ValueError(f"spread must be a standard deviation in tokens of at least 0, got {spread}")
    if tokens.ndim != 4 or tokens.shape[2] != grid.video_tokens:
        raise ValueError(
            f"tokens must be [batch, heads, {grid.video_tokens}, channels] for this grid, got {list(tokens.shape)}"
        )
    if spread == 0:
        return tokens
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    frames = tokens.to(dtype).unflatten(2, (grid.frames, grid.height, grid.width))
    rows, columns = (_neighbour_shares(size, spread, frames) for size in (grid.height, grid.width))
    smoothed = torch.einsum("ij,bhfjwd->bhfiwd", rows, frames)
    smoothed = torch.einsum("ij,bhfrjd->bhfrid", columns, smoothed)
    return smoothed.flatten(2, 4).to(tokens.dtype)


def _neighbour_shares(size: int, spread: float, like: Tensor) -> Tensor:
    """`[size, size]`, row i the share of every token in the mean at i."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    weight = torch.exp((place[:, None] - place).square() / (-2 * spread**2))
    return weight / weight.sum(1, keepdim=True)
