"""Frame-local attention by `scaled_dot_product_attention`, frame by frame: the honest plain-PyTorch way.

Masking before the softmax leaves every video token the text and its own frame, so the frames become a batch: no pair
of tokens of different frames is touched. Keys and values of the text are copied to every frame.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.benchmark.baselines.attention_positions import kernel_name
from corrdit.grid import TokenGrid


def frame_local_attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
    """`[B, H, N, D]`; takes text tokens, which must come first or last."""
    video = functional.scaled_dot_product_attention(*_frames(q, k, v, grid))
    video = video.unflatten(0, (q.shape[0], grid.frames)).transpose(1, 2).flatten(2, 3)
    if not grid.text_tokens:
        return video
    text = functional.scaled_dot_product_attention(q[:, :, grid.text_slice], k, v)
    return torch.cat((text, video) if grid.text_first else (video, text), dim=2)


def chosen_kernel(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> str:
    """Which of PyTorch's attention kernels the video tokens end up in."""
    return kernel_name(*(tensor[:1] for tensor in _frames(q, k, v, grid)))


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
