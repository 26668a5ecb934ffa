"""Checks of what a user passes to an operation, with errors that say what was given and what is accepted."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from torch import Tensor

from corrdit.grid import TokenGrid, whole_number

HEAD_MODES = ("logits", "features", "probabilities", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tokens(grid: TokenGrid, **tensors: Tensor) -> None:
    """Every tensor is `[B, H, N, D]` of one shape, dtype and device, with N as the grid says."""
    if not isinstance(grid, TokenGrid):
        raise ValueError(f"grid must be a corrdit.TokenGrid, got {type(grid).__name__}")
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, head_dim], got {type(tensor).__name__}")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], none empty, got {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        for what in ("shape", "dtype", "device"):
            here, there = getattr(tensor, what), getattr(first, what)
            if here != there:
                here, there = (list(here), list(there)) if what == "shape" else (here, there)
                raise ValueError(f"{first_name} and {name} must have the same {what}, got {there} and {here}")
    if first.shape[2] != grid.tokens:
        raise ValueError(
            f"{first_name} has {first.shape[2]} tokens, but the grid has {grid.tokens} "
            f"({grid.text_tokens} text + {grid.frames} frames x {grid.height} x {grid.width}); "
            "the grid must describe the whole token axis"
        )


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a finite float, above zero if asked."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name} must be finite{' and above 0' if positive else ''}, got {value}")
    return number


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of q.k: `head_dim ** -0.5` unless given."""
    return head_dim**-0.5 if scale is None else check_number("scale", scale, positive=True)


def check_budget(memory_budget: int | None) -> int | None:
    return None if memory_budget is None else whole_number("memory_budget (bytes)", memory_budget, 1)


def check_key_mask(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """bool `[B, N]`, True = may be attended."""
    if key_mask is None:
        return None
    expected = [q.shape[0], q.shape[2]]
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or list(key_mask.shape) != expected:
        given = f"{key_mask.dtype} {list(key_mask.shape)}" if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise ValueError(
            f"key_mask must be a bool tensor [batch, tokens] = {expected}, True = may be attended, got {given}"
        )
    if key_mask.device != q.device:
        raise ValueError(f"key_mask is on {key_mask.device}, q on {q.device}; they must be on one device")
    return key_mask


def check_heads(heads: str, head_weights: Tensor | Iterable[float] | None, q: Tensor) -> Tensor | None:
    """The weights over heads `[H]` (summing to 1, in the working precision), None for heads="none"."""
    if heads not in HEAD_MODES:
        raise ValueError(f"heads must be one of {', '.join(HEAD_MODES)}, got {heads!r}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    count = q.shape[1]
    if heads == "none":
        if head_weights is not None:
            raise ValueError('head_weights average heads, but heads="none" keeps them apart; drop one of the two')
        return None
    if head_weights is None:
        # One number expanded: by its stride a backend knows equal weights without reading them from the device.
        return torch.full((1,), 1 / count, dtype=dtype, device=q.device).expand(count)
    weights = torch.as_tensor(
        head_weights if isinstance(head_weights, Tensor) else list(head_weights), dtype=dtype, device=q.device
    ).detach()
    if list(weights.shape) != [count]:
        raise ValueError(f"head_weights must have one weight a head, [{count}], got {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or float(weights.sum()) <= 0:
        raise ValueError(f"head_weights must be finite, not negative and not all zero, got {weights.tolist()}")
    return weights / weights.sum()


def check_frame(name: str, frame: int, grid: TokenGrid) -> int:
    frame = whole_number(name, frame, 0)
    if frame >= grid.frames:
        raise ValueError(f"{name} is frame {frame}, but the grid has frames 0 to {grid.frames - 1}")
    return frame


def check_frame_tokens(tokens: Tensor | Iterable[int], grid: TokenGrid, device: torch.device) -> Tensor:
    """int64 `[P]` flat token indices row * width + column within one frame."""
    indices = torch.as_tensor(tokens if isinstance(tokens, Tensor) else list(tokens))
    integral = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.ndim != 1 or indices.numel() == 0 or not integral:
        raise ValueError(
            "tokens must be a non-empty list or 1-D integer tensor of flat indices, "
            f"got {list(indices.shape)} {indices.dtype}"
        )
    lowest, highest = int(indices.min()), int(indices.max())
    if lowest < 0 or highest >= grid.tokens_per_frame:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"token {wrong} is outside the source frame, whose flat indices go from 0 to {grid.tokens_per_frame - 1}"
        )
    return indices.to(device=device, dtype=torch.int64)
