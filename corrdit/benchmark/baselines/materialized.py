"""The released functions' way: scores of all heads and all token pairs at once."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid


def soft_displacement(q: Tensor, k: Tensor, grid: TokenGrid, *, temperature: float = 1.0) -> Tensor:
    """Attention motion flow as in DiTFlow's released code: `[B, F, F, h, w, 2]`.

    One product for every pair of tokens and every head, its division by sqrt(D), the mean over heads, and a softmax for
    each frame. Then, for each pair of frames, tables of whole-number differences in x and in y between all its tokens
    are made, multiplied by the weights and summed. (The released code takes one batch entry; so does this, in a loop.)
    """
    return torch.stack([_motion_flow(*entry, grid, temperature) for entry in zip(q, k, strict=True)])


def _motion_flow(q: Tensor, k: Tensor, grid: TokenGrid, temperature: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / torch.tensor(q.shape[-1], dtype=q.dtype, device=q.device).sqrt()
    by_frame = scores.mean(0).unflatten(-1, (grid.frames, grid.tokens_per_frame))
    weights = torch.softmax(by_frame * temperature, dim=-1).unflatten(0, (grid.frames, grid.tokens_per_frame))
    flows = [_weighted_difference(weights[i, :, j], grid) for i in range(grid.frames) for j in range(grid.frames)]
    return torch.stack(flows).view(grid.frames, grid.frames, grid.height, grid.width, 2)


def _weighted_difference(weights: Tensor, grid: TokenGrid) -> Tensor:
    x, y = grid.coordinates(weights.device).long().unbind(-1)
    return torch.stack([((axis[None, :] - axis[:, None]) * weights).sum(1) for axis in (x, y)], dim=-1)


def hard_displacement(q: Tensor, k: Tensor, grid: TokenGrid) -> Tensor:
    """The argmax of the same scores: int64 `[B, F, F, h, w, 2]`."""
    tokens = grid.tokens_per_frame
    scores = (torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5).mean(dim=1)
    best = scores.unflatten(-1, (grid.frames, tokens)).argmax(-1)  # [B, F*S, F]
    best = best.unflatten(1, (grid.frames, tokens)).transpose(2, 3)
    position = grid.coordinates(q.device).long()
    return (position[best] - position).unflatten(-2, (grid.height, grid.width))


def match(
    q: Tensor, k: Tensor, grid: TokenGrid, *, source: int = 0, bidirectional: bool = True
) -> tuple[Tensor, Tensor]:
    """Matching as in DiffTrack's released code: softmax of every head in both directions, mean, argmax.

    Returns:
        xy `[B, F - 1, h, w, 2]` and score `[B, F - 1, h, w]`.
    """
    others = [frame for frame in range(grid.frames) if frame != source]
    score, best = _cost(q, k, grid, source, others, bidirectional).max(-1)
    xy = grid.coordinates(q.device, score.dtype)[best]
    return xy.unflatten(-2, (grid.height, grid.width)), score.unflatten(-1, (grid.height, grid.width))


def cost_rows(q: Tensor, k: Tensor, grid: TokenGrid, tokens: Tensor, *, source: int = 0) -> Tensor:
    """Rows of the same maps, of which the released code makes all: `[B, P, F, h, w]`."""
    cost = _cost(q, k, grid, source, list(range(grid.frames)), bidirectional=True)
    return cost[:, :, tokens].transpose(1, 2).unflatten(-1, (grid.height, grid.width))


def _cost(q: Tensor, k: Tensor, grid: TokenGrid, source: int, targets: list[int], bidirectional: bool) -> Tensor:
    """`[B, targets, S, S]` mean over heads of the forward softmax, or of both directions."""
    tokens, factor = grid.tokens_per_frame, q.shape[-1] ** -0.5
    q, k = (tensor.unflatten(2, (grid.frames, tokens)) for tensor in (q, k))
    forward = torch.einsum("bhpd,bhfkd->bfhpk", q[:, :, source], k[:, :, targets]) * factor
    cost = forward.softmax(-1).mean(2)
    if not bidirectional:
        return cost
    backward = torch.einsum("bhfkd,bhpd->bfhkp", q[:, :, targets], k[:, :, source]) * factor
    return (cost + backward.softmax(-1).mean(2).transpose(-1, -2)) / 2


def attention_mass(q: Tensor, k: Tensor, grid: TokenGrid, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, frames, text_peak, frame_peak) from the whole rows of tokens of frame 0; takes text tokens."""
    queries = q[:, :, grid.frame_slice(0)][:, :, tokens]
    weight = (torch.matmul(queries, k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1).mean(1)
    text = weight[..., grid.text_slice]
    frames = weight[..., grid.video_slice].unflatten(-1, (grid.frames, grid.tokens_per_frame))
    text_peak = text.amax(-1) if grid.text_tokens else text.sum(-1)
    return text.sum(-1), frames.sum(-1), text_peak, frames.amax(-1)


def frame_local_attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, *, renormalize: bool = True) -> Tensor:
    """Attention without its cross-frame part as in DiffTrack's released code: a full map with blocks taken out.

    Takes text tokens, which attend to everything and are attended by everything.
    """
    frame = torch.full((grid.tokens,), -1, device=q.device)
    frame[grid.video_slice] = torch.arange(grid.frames, device=q.device).repeat_interleave(grid.tokens_per_frame)
    apart = (frame[:, None] != frame[None, :]) & (frame[:, None] >= 0) & (frame[None, :] >= 0)
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if renormalize:
        return torch.matmul(scores.masked_fill(apart, float("-inf")).softmax(-1), v)
    return torch.matmul(scores.softmax(-1).masked_fill(apart, 0.0), v)
