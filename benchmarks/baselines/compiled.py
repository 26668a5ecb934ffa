"""`torch.compile` of the reference, and FlexAttention with the coordinates as values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from corrdit import reference
from corrdit.grid import TokenGrid


@functools.cache
def _compiled_reference(name: str) -> Callable[..., Tensor]:
    compiled: Callable[..., Tensor] = torch.compile(getattr(reference, name))
    return compiled


def soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, heads: str = "logits", temperature: float = 1.0
) -> Tensor:
    """The materialising reference under `torch.compile`: `[B, F, F, h, w, 2]`."""
    weights = torch.full((q.shape[1],), 1 / q.shape[1], device=q.device)
    moved = _compiled_reference("soft_displacement")(
        q, k, grid, grid.frame_pairs(), heads=heads, weights=weights, scale=q.shape[-1] ** -0.5,
        temperature=temperature, key_mask=None, window=None, center=None,
    )  # fmt: skip
    return moved.unflatten(1, (grid.frames, grid.frames))


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def flex_soft_displacement(q: Tensor, k: Tensor, grid: TokenGrid, *, temperature: float = 1.0) -> Tensor:
    """heads="probabilities" by FlexAttention, values 16 wide: `[B, F, F, h, w, 2]`."""
    tokens = grid.tokens_per_frame
    position = grid.coordinates(q.device, torch.promote_types(q.dtype, torch.float32))
    middle, extent = position.mean(0), float(max(grid.height, grid.width))
    values = functional.pad(((position - middle) / extent).to(q.dtype), (0, 14))
    values = values.expand(q.shape[0], q.shape[1], tokens, 16).contiguous()
    expected = []
    for frame in range(grid.frames):
        keys = k[:, :, frame * tokens : (frame + 1) * tokens].contiguous()
        attended = _compiled_flex_attention()(q, keys, values, scale=temperature * q.shape[-1] ** -0.5)
        expected.append(attended[..., :2].to(position.dtype).mean(1) * extent + middle)
    result = torch.stack(expected, dim=1).unflatten(2, (grid.frames, tokens)).transpose(1, 2)
    return (result - position).unflatten(-2, (grid.height, grid.width))


@functools.cache
def _same_frame_mask(grid: TokenGrid, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    first, last = grid.video_slice.start, grid.video_slice.stop
    tokens = grid.tokens_per_frame

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        text = (query < first) | (query >= last) | (key < first) | (key >= last)
        return text | ((query - first) // tokens == (key - first) // tokens)

    return create_block_mask(seen, None, None, grid.tokens, grid.tokens, device=device)


def flex_frame_local_attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
    """Renormalised frame-local attention by FlexAttention with a block mask; takes text tokens."""
    return _compiled_flex_attention()(q, k, v, block_mask=_same_frame_mask(grid, q.device))
