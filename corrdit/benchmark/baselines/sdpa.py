"""`scaled_dot_product_attention` as a user of plain PyTorch would take it.

Soft displacement: the expected position under a softmax is attention with the positions as values. PyTorch's fused
kernels want values as wide as the keys, so x and y are padded with zeros: most of the second product is wasted, and
which kernel runs depends on the width (`kernel_name` says). Heads="logits" is one head of width H*D; per-head softmax
is the plain case.

Frame-local attention: masking before the softmax leaves every video token the text and its own frame, so the frames
become a batch, and no pair of tokens of different frames is touched. Keys and values of the text are copied to every
frame.

`attend` is PyTorch's own choice of a kernel, one kernel of PyTorch's alone (`only`), or FlashAttention-3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from corrdit.grid import TokenGrid

Attend = Callable[..., Tensor]
"""Attention of q, k, v `[B, H, N, D]`, with `scale`."""


def only(backend: SDPBackend) -> Attend:
    """`scaled_dot_product_attention` that takes one of PyTorch's kernels, or raises RuntimeError where it cannot."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, scale=scale)

    return attend


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """FlashAttention-3 (https://github.com/Dao-AILab/flash-attention, `hopper`), where it is installed."""
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)), softmax_scale=scale)
    attended: Tensor = found[0] if isinstance(found, tuple) else found  # early releases give the log-sum-exp too
    return attended.transpose(1, 2)


def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    temperature: float = 1.0,
    attend: Attend = functional.scaled_dot_product_attention,
) -> Tensor:
    """`[B, F, F, h, w, 2]` for heads="logits" or "probabilities"; one attention call for each key frame."""
    q, k, factor = _arranged(q, k, heads)
    attend = functools.partial(attend, scale=temperature * factor)
    return positions_as_values(attend, q, k, grid, width=q.shape[-1])


def positions_as_values(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    width: int,
    contiguous: bool = False,
) -> Tensor:
    """`[B, F, F, h, w, 2]` by any attention of queries, the keys of a frame and values padded to `width`."""
    tokens = grid.tokens_per_frame
    # Centred, and scaled to about 1: half precision has too few bits for the positions themselves.
    position = grid.coordinates(q.device, torch.promote_types(q.dtype, torch.float32))
    middle, extent = position.mean(0), float(max(grid.height, grid.width))
    values = functional.pad(((position - middle) / extent).to(q.dtype), (0, width - 2))
    values = values.expand(q.shape[0], q.shape[1], tokens, width)
    values = values.contiguous() if contiguous else values
    expected = []
    for frame in range(grid.frames):
        keys = k[:, :, frame * tokens : (frame + 1) * tokens]
        attended = attend(q, keys.contiguous() if contiguous else keys, values)
        expected.append(attended[..., :2].to(position.dtype).mean(1) * extent + middle)
    result = torch.stack(expected, dim=1).unflatten(2, (grid.frames, tokens)).transpose(1, 2)
    return (result - position).unflatten(-2, (grid.height, grid.width))


def frame_local_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, *, attend: Attend = functional.scaled_dot_product_attention
) -> Tensor:
    """`[B, H, N, D]`; takes text tokens, which must come first or last."""
    video = attend(*_frames(q, k, v, grid))
    video = video.unflatten(0, (q.shape[0], grid.frames)).transpose(1, 2).flatten(2, 3)
    if not grid.text_tokens:
        return video
    text = attend(q[:, :, grid.text_slice], k, v)
    return torch.cat((text, video) if grid.text_first else (video, text), dim=2)


def displacement_kernel(q: Tensor, k: Tensor, grid: TokenGrid, heads: str) -> str:
    """Which of PyTorch's attention kernels `soft_displacement` ends up in for such tensors."""
    q, k, _ = _arranged(q, k, heads)
    return kernel_name(q, k[:, :, : grid.tokens_per_frame], k[:, :, : grid.tokens_per_frame])


def frame_local_kernel(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> str:
    """Which of PyTorch's attention kernels the video tokens of `frame_local_attention` end up in."""
    return kernel_name(*(tensor[:1] for tensor in _frames(q, k, v, grid)))


def kernel_name(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What PyTorch's own choice for `scaled_dot_product_attention` is: flash, efficient, cudnn or math."""
    choice = SDPBackend(torch._fused_sdp_choice(q, k, v))
    return str(choice.name).lower().removesuffix("_attention")


def _arranged(q: Tensor, k: Tensor, heads: str) -> tuple[Tensor, Tensor, float]:
    """Queries and keys as one attention call takes them, and the factor of their products."""
    if heads == "logits":
        factor = q.shape[-1] ** -0.5 / q.shape[1]
        q, k = (tensor.transpose(1, 2).flatten(2).unsqueeze(1) for tensor in (q, k))
        return q, k, factor
    if heads == "probabilities":
        return q, k, q.shape[-1] ** -0.5
    raise ValueError(f'heads must be "logits" or "probabilities" here, got {heads!r}')


def _frames(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B*F, H, S, D]` of every frame, keys and values `[B*F, H, T + S, D]` of the text and the frame."""
    by_frame = [
        tensor[:, :, grid.video_slice].unflatten(2, (grid.frames, grid.tokens_per_frame)).transpose(1, 2).flatten(0, 1)
        for tensor in (q, k, v)
    ]
    if not grid.text_tokens:
        return by_frame[0], by_frame[1], by_frame[2]
    texts = [tensor[:, :, grid.text_slice].repeat_interleave(grid.frames, dim=0) for tensor in (k, v)]
    return by_frame[0], torch.cat((texts[0], by_frame[1]), dim=2), torch.cat((texts[1], by_frame[2]), dim=2)
