"""Attention of the video on the words of its prompt, and a loss that keeps a word's attention inside a moving box.

The loss is that of Chen et al., "Training-Free Layout Control with Cross-Attention Guidance" (arXiv
2304.03373), for each latent frame and a box of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from corrdit.arguments import finite_number, whole_indices
from corrdit.grid import CrossGrid, TokenGrid


def word_attention(
    q: Tensor, k: Tensor, grid: TokenGrid | CrossGrid, words: Iterable[int], *, key_mask: Tensor | None = None
) -> Tensor:
    """Share of its attention on the text that each video token gives to some text tokens.

    Args:
        q, k: `[B, H, N, D]` of joint attention; or of cross-attention `[B, H, F * S, D]` and `[B, H, T, D]`.
        grid: how the N tokens are arranged, with text; or a `CrossGrid`.
        words: positions among the text tokens.
        key_mask: bool `[B, N]` (`[B, T]`); text tokens that it leaves out get nothing.

    Returns:
        float32 (float64 for float64) `[B, F, h, w]`, 0 to 1, the mean over heads.

    Raises:
        ValueError: a grid without text, or positions outside it.
    """
    if isinstance(grid, TokenGrid):
        if not grid.text_tokens:
            raise ValueError(
                "this attention holds no text tokens (the model reads its prompt by cross-attention), so no word's "
                'attention can be read from it; capture(attention="cross") reads that'
            )
        key_mask = None if key_mask is None else key_mask[:, grid.text_slice]
        q, k, text_tokens = q[:, :, grid.video_slice], k[:, :, grid.text_slice], grid.text_tokens
    else:
        text_tokens = grid.keys
    places = whole_indices("words", words)
    if min(places) < 0 or max(places) >= text_tokens:
        raise ValueError(f"words must be positions from 0 to {text_tokens - 1}, got {places}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], float("-inf"))
    weights = logits.softmax(-1)[..., places].sum(-1).mean(1)
    return weights.unflatten(1, (grid.frames, grid.height, grid.width))


def inside_loss(attention: Tensor, region: Tensor) -> Tensor:
    """Squared share of a word's attention that lies outside a region, averaged over frames.

    Args:
        attention: `[B, F, h, w]`, as `word_attention` gives it; the loss is differentiable in it.
        region: bool `[F, h, w]`.

    Returns:
        Scalar, 0 (all inside) to 1.

    Raises:
        ValueError: shapes that do not fit.
    """
    if attention.shape[1:] != region.shape or region.dtype != torch.bool:
        raise ValueError(f"region must be bool {list(attention.shape[1:])}, got {region.dtype} {list(region.shape)}")
    inside = (attention * region.to(attention)).flatten(2).sum(-1)
    return (1 - inside / attention.flatten(2).sum(-1).clamp(min=torch.finfo(attention.dtype).tiny)).square().mean()


def boxes_on_path(path: Sequence[Sequence[float]], times: Sequence[float], height: int, width: int) -> Tensor:
    """Boxes at some times, as the tokens whose middle is in them.

    Args:
        path: (time, left, top, right, bottom) each, all as shares of the video's length and the frame's sides, 0 to 1,
            by ascending time; in between boxes move evenly, before the first and behind the last they stand.
        times: of the frames, 0 to 1.
        height, width: of a frame, in tokens.

    Returns:
        bool `[len(times), height, width]`; a box too small to hold a middle has the token nearest to its own.

    Raises:
        ValueError: what is no path.
    """
    rows = checked_path(path)
    found = torch.zeros(len(times), height, width, dtype=torch.bool)
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    for frame, time in enumerate(times):
        left, top, right, bottom = _box_at(rows, time)
        row, column = (y >= top) & (y <= bottom), (x >= left) & (x <= right)
        row[(y - (top + bottom) / 2).abs().argmin()] = True
        column[(x - (left + right) / 2).abs().argmin()] = True
        found[frame] = row[:, None] & column[None]
    return found


def checked_path(path: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """A path as tuples of floats.

    Raises:
        ValueError: what is no path.
    """
    rows: list[tuple[float, ...]] = []
    for entry in path:
        if not isinstance(entry, Sequence) or len(entry) != 5:
            raise ValueError(f"path must be entries of (time, left, top, right, bottom), got {entry!r} in it")
        row = tuple(finite_number("path", number, least=0, most=1) for number in entry)
        if not (row[1] < row[3] and row[2] < row[4]):
            raise ValueError(
                f"a box of path is (left, top, right, bottom) with left < right and top < bottom, got {row[1:]}"
            )
        if rows and row[0] <= rows[-1][0]:
            raise ValueError(f"the times of a path must ascend, got {row[0]} behind {rows[-1][0]}")
        rows.append(row)
    if not rows:
        raise ValueError("path is empty; give at least one (time, left, top, right, bottom)")
    return tuple(rows)


def _box_at(rows: tuple[tuple[float, ...], ...], time: float) -> tuple[float, ...]:
    for before, after in itertools.pairwise(rows):
        if before[0] <= time <= after[0]:
            share = (time - before[0]) / (after[0] - before[0])
            return tuple(a + share * (b - a) for a, b in zip(before[1:], after[1:], strict=True))
    return rows[0][1:] if time < rows[0][0] else rows[-1][1:]
