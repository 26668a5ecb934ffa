"""Soft displacement by `scaled_dot_product_attention` with the coordinates as values.

The expected position under a softmax is attention with the positions as values. PyTorch's fused kernels want values as
wide as the keys, so x and y are padded with zeros: most of the second product is wasted, and which kernel runs depends
on the width (`kernel_name` says). Heads="logits" is one head of width H*D; per-head softmax is the plain case.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend

from corrdit.grid import TokenGrid


def soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, heads: str = "logits", temperature: float = 1.0
) -> Tensor:
    """`[B, F, F, h, w, 2]` for heads="logits" or "probabilities"; one attention call for each key frame."""
    q, k, factor = _arranged(q, k, heads)
    tokens, width = grid.tokens_per_frame, q.shape[-1]
    # Centred, and scaled to about 1: half precision has too few bits for the positions themselves.
    position = grid.coordinates(q.device, torch.promote_types(q.dtype, torch.float32))
    middle, extent = position.mean(0), float(max(grid.height, grid.width))
    values = functional.pad(((position - middle) / extent).to(q.dtype), (0, width - 2))
    values = values.expand(q.shape[0], q.shape[1], tokens, width)
    expected = []
    for frame in range(grid.frames):
        keys = k[:, :, frame * tokens : (frame + 1) * tokens]
        attended = functional.scaled_dot_product_attention(q, keys, values, scale=temperature * factor)
        expected.append(attended[..., :2].to(position.dtype).mean(1) * extent + middle)
    result = torch.stack(expected, dim=1).unflatten(2, (grid.frames, tokens)).transpose(1, 2)
    return (result - position).unflatten(-2, (grid.height, grid.width))


def _arranged(q: Tensor, k: Tensor, heads: str) -> tuple[Tensor, Tensor, float]:
    """Queries and keys as one attention call takes them, and the factor of their products."""
    if heads == "logits":
        factor = q.shape[-1] ** -0.5 / q.shape[1]
        q, k = (tensor.transpose(1, 2).flatten(2).unsqueeze(1) for tensor in (q, k))
        return q, k, factor
    if heads == "probabilities":
        return q, k, q.shape[-1] ** -0.5
    raise ValueError(f'heads must be "logits" or "probabilities" here, got {heads!r}')


def chosen_kernel(q: Tensor, k: Tensor, grid: TokenGrid, heads: str) -> str:
    """Which of PyTorch's attention kernels `soft_displacement` ends up in for such tensors."""
    q, k, _ = _arranged(q, k, heads)
    return kernel_name(q, k[:, :, : grid.tokens_per_frame], k[:, :, : grid.tokens_per_frame])


def kernel_name(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What PyTorch's own choice for `scaled_dot_product_attention` is: flash, efficient, cudnn or math."""
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v))
    return str(choice.name).lower().removesuffix("_attention")
