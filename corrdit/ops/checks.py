"""Checks of what a user passes to an operation, with errors that say what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from corrdit.arguments import choice, entries, finite_number, whole_number
from corrdit.grid import TokenGrid

HEAD_MODES = ("logits", "features", "probabilities", "none")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Two such factors and log2(e) still multiply to an ordinary float32.
SMALLEST_FACTOR = 1e-18


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
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, where tensors have no values; give it on a real device")
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


def may_read(tensor: Tensor) -> bool:
    """Whether values may be looked at: not while a graph is traced or captured, which that would break."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_factor(name: str, value: object) -> float:
    """`value` as a finite float above zero, of a size whose products float32 holds."""
    number = finite_number(name, value, above=0)
    if not SMALLEST_FACTOR <= number <= 1 / SMALLEST_FACTOR:
        raise ValueError(f"{name} must lie in {SMALLEST_FACTOR:g} to {1 / SMALLEST_FACTOR:g}, got {value}")
    return number


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of q.k: `head_dim ** -0.5` unless given."""
    return head_dim**-0.5 if scale is None else check_factor("scale", scale)


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
    choice("heads", heads, HEAD_MODES)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    count = q.shape[1]
    if heads == "none":
        if head_weights is not None:
            raise ValueError('head_weights average heads, but heads="none" keeps them apart; drop one of the two')
        return None
    if head_weights is None:
        # One number expanded: by its stride a backend knows equal weights without reading them from the device.
        return torch.full((1,), 1 / count, dtype=dtype, device=q.device).expand(count)
    if isinstance(head_weights, Tensor):
        return _weights_of_tensor(head_weights.detach(), count).to(device=q.device, dtype=dtype)
    numbers = [finite_number("a weight of head_weights", entry) for entry in entries("head_weights", head_weights)]
    if len(numbers) != count:
        raise ValueError(f"head_weights must have one weight a head, [{count}], got [{len(numbers)}]")
    largest = max(numbers)
    if min(numbers) < 0 or largest <= 0:
        raise ValueError(f"head_weights must be finite, not negative and not all zero, got {numbers}")
    shares = [number / largest for number in numbers]
    return torch.tensor([share / sum(shares) for share in shares], dtype=dtype, device=q.device)


def _weights_of_tensor(weights: Tensor, count: int) -> Tensor:
    """`[H]` normalised to sum 1."""
    if list(weights.shape) != [count] or weights.is_complex():
        raise ValueError(
            f"head_weights must have one real weight a head, [{count}], got {list(weights.shape)} {weights.dtype}"
        )
    weights = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
    if may_read(weights) and not bool((weights.isfinite() & (weights >= 0)).all() & (weights > 0).any()):
        raise ValueError(f"head_weights must be finite, not negative and not all zero, got {weights.tolist()}")
    # By the largest first: the sum of large weights might overflow.
    weights = weights / weights.amax()
    return weights / weights.sum()


def check_frame(name: str, frame: object, grid: TokenGrid) -> int:
    index = whole_number(name, frame, 0)
    if index >= grid.frames:
        raise ValueError(f"{name} is frame {index}, but the grid has frames 0 to {grid.frames - 1}")
    return index


def check_frame_tokens(tokens: Tensor | Iterable[int], grid: TokenGrid, device: torch.device) -> Tensor:
    """int64 `[P]` flat token indices row * width + column within one frame."""
    if isinstance(tokens, Tensor):
        integral = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if tokens.ndim != 1 or tokens.numel() == 0 or not integral:
            raise ValueError(
                "tokens must be a non-empty list or 1-D integer tensor of flat indices, "
                f"got {list(tokens.shape)} {tokens.dtype}"
            )
        indices = tokens.to(torch.int64)
        if not may_read(indices):
            return indices.to(device)
        lowest, highest = int(indices.min()), int(indices.max())
    else:
        numbers = [whole_number("a token of tokens", entry, 0) for entry in entries("tokens", tokens)]
        if not numbers:
            raise ValueError("tokens is an empty list; give at least one flat index of the source frame")
        lowest, highest = min(numbers), max(numbers)
    if lowest < 0 or highest >= grid.tokens_per_frame:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"token {wrong} is outside the source frame, whose flat indices go from 0 to {grid.tokens_per_frame - 1}"
        )
    return indices.to(device) if isinstance(tokens, Tensor) else torch.tensor(numbers, device=device)
