"""Score maps between two sets of tokens: logits, their reduction over heads, masks and softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def logits_between(queries: Tensor, keys: Tensor, *, heads: str, weights: Tensor | None, scale: float) -> Tensor:
    """`scale * q.k` between `[B, H, P, D]` and `[B, H, K, D]`.

    Returns:
        `[B, 1, P, K]`, the weighted mean over heads, for heads="logits"; `[B, H, P, K]` otherwise.
    """
    dtype = working_dtype(queries)
    scores = scale * torch.einsum("bhpd,bhkd->bhpk", queries.to(dtype), keys.to(dtype))
    if heads == "logits":
        scores = torch.einsum("bhpk,h->bpk", scores, weights).unsqueeze(1)
    return scores


def masked_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis among the allowed keys; a row without any gives zeros."""
    if allowed is None:
        return logits.softmax(-1)
    allowed = allowed.expand_as(logits)
    some_key = allowed.any(-1, keepdim=True)
    # An empty row gets finite logits before the softmax, so that neither it nor its gradient is NaN.
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some_key, 0.0)
    return logits.softmax(-1).masked_fill(~some_key, 0.0)


def reduce_heads(maps: Tensor, heads: str, weights: Tensor | None) -> Tensor:
    """`[B, H, ...]` to `[B, ...]`: the mean for "probabilities", the only entry for "logits", as is for "none"."""
    if heads == "none":
        return maps
    if heads == "logits":
        return maps.squeeze(1)
    return torch.einsum("bh...,h->b...", maps, weights)


def window_mask(grid: TokenGrid, window: int, center: Tensor | None, device: torch.device) -> Tensor:
    """`[B or 1, 1, S, S]`: which keys lie within `window` rows and columns of the window's centre.

    Args:
        center: `[B, h, w, 2]` centre (x, y) in tokens of the key frame, rounded to a token and moved into the frame;
            None for each query's own position.
    """
    position = grid.coordinates(device)
    if center is None:
        middle = position.unsqueeze(0)
    else:
        last = torch.tensor([grid.width - 1, grid.height - 1], device=device, dtype=center.dtype)
        middle = center.round().clamp(min=torch.zeros_like(last), max=last).flatten(1, 2).to(position.dtype)
    offset = (position[None, None] - middle.unsqueeze(2)).abs()
    return (offset <= window).all(-1).unsqueeze(1)


def allowed_keys(
    grid: TokenGrid, key_mask: Tensor | None, window: int | None, center: Tensor | None, device: torch.device
) -> Tensor | None:
    """`[B or 1, 1, S or 1, S]` keys of one frame that a query may use, None where every key is allowed."""
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    if window is not None:
        inside = window_mask(grid, window, center, device)
        allowed = inside if allowed is None else inside & allowed
    return allowed


def frame(tensor: Tensor, grid: TokenGrid, index: int) -> Tensor:
    """The tokens of one frame of `[B, H, N, D]` (or of a `[B, N]` mask)."""
    part = grid.frame_slice(index)
    return tensor[:, part] if tensor.ndim == 2 else tensor[:, :, part]
