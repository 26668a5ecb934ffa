"""Soft displacement by `scaled_dot_product_attention` with the coordinates as values.

The expected position under a softmax is attention with the positions as values. PyTorch's fused kernels want values as
wide as the keys, so x and y are padded with zeros: most of the second product is wasted, and which kernel runs depends
on the width (`chosen_kernel` says). Heads="logits" is one head of width H*D; per-head softmax is the plain case.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from corrdit.grid import TokenGrid


def soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, heads: str = "logits", temperature: float = 1.0
) -> Tensor:
    """`[B, F, F, h, w, 2]` for heads="logits" or "probabilities"; one attention call for each key frame."""
    if heads == "logits":
        factor = q.shape[-1] ** -0.5 / q.shape[1]
        q, k = (tensor.transpose(1, 2).flatten(2).unsqueeze(1) for tensor in (q, k))
    elif heads == "probabilities":
        factor = q.shape[-1] ** -0.5
    else:
        raise ValueError(f'heads must be "logits" or "probabilities" here, got {heads!r}')
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


def chosen_kernel(q: Tensor, k: Tensor) -> str:
    """Which of PyTorch's attention kernels runs for such queries and keys."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                functional.scaled_dot_product_attention(q[:, :, :16], k[:, :, :16], k[:, :, :16])
        except RuntimeError:
            continue
        return backend.name.lower()
    return SDPBackend.MATH.name.lower()
