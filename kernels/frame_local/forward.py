"""Frame-local attention: which tokens see which, and the forward kernel.

The token axis is cut into tiles that never straddle the text or a frame, so that what a tile sees is a few stretches of
tokens: the text, the frames near its own, and (for weights dropped after the softmax) the frames before and after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.kernels.shared.configs import padded_head_dim
from corrdit.kernels.shared.launch import choose_tiles, launch, tile_count
from corrdit.kernels.shared.primitives import (
    exponentials,
    load_allowed,
    load_tile,
    log_sum_exp,
    multiply,
    product,
    raise_peak,
    store_tile,
    wide,
)
from corrdit.problem import product_precision


@triton.jit
def tile_stretch(tile, layout, BLOCK: tl.constexpr):
    """(first token, end of its stretch, frame or -1 for text) of a tile of `BLOCK` tokens.

    Args:
        layout: (text start, text tokens, video start, frames, tokens of a frame, span).
    """
    text_tiles = tl.cdiv(layout[1], BLOCK)
    frame_tiles = tl.cdiv(layout[4], BLOCK)
    frame = (tile - text_tiles) // frame_tiles
    video_first = layout[2] + frame * layout[4]
    first = video_first + (tile - text_tiles) % frame_tiles * BLOCK
    text_first = layout[0] + tile * BLOCK
    is_text = tile < text_tiles
    return (
        tl.where(is_text, text_first, first),
        tl.where(is_text, layout[0] + layout[1], video_first + layout[4]),
        tl.where(is_text, -1, frame),
    )


@triton.jit
def visible_stretch(part: tl.constexpr, frame, layout):
    """(start, end) of what a token of `frame` (-1: text) sees: the text (0), the frames near its own (1), and the
    frames before (2) and after (3), whose weights count in the softmax alone. Seeing is mutual."""
    near = tl.where(frame < 0, 0, tl.maximum(frame - layout[5], 0))
    beyond = tl.where(frame < 0, layout[3], tl.minimum(frame + layout[5] + 1, layout[3]))
    if part == 0:
        return layout[0] + near * 0, layout[0] + layout[1] + near * 0
    elif part == 1:
        return layout[2] + near * layout[4], layout[2] + beyond * layout[4]
    elif part == 2:
        return layout[2] + near * 0, layout[2] + near * layout[4]
    else:
        return layout[2] + beyond * layout[4], layout[2] + layout[3] * layout[4] + near * 0


@triton.jit
def local_forward_kernel(
    q, k, v, output, statistics, key_mask, q_strides, k_strides, v_strides, output_strides, mask_strides,
    heads, tokens, layout, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, batch * head): attention of its rows and their base-2 log-sum-exp."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    first_row, last_row, frame = tile_stretch(tl.program_id(0), layout, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    kept_rows = rows < last_row
    dims = tl.arange(0, BLOCK_D)
    q += wide(batch) * q_strides[0] + wide(head) * q_strides[1]
    k += wide(batch) * k_strides[0] + wide(head) * k_strides[1]
    v += wide(batch) * v_strides[0] + wide(head) * v_strides[1]
    output += wide(batch) * output_strides[0] + wide(head) * output_strides[1]
    key_mask += wide(batch) * mask_strides[0]
    q_tile = load_tile(q, rows, dims, q_strides, kept_rows, True, D)  # [M, D]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        start, end = visible_stretch(part, frame, layout)
        for first in range(start, end, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            inside = load_allowed(key_mask, columns, columns < end, mask_strides[1], HAS_MASK)
            k_tile = load_tile(k, columns, dims, k_strides, inside, True, D)  # [N, D]
            scores = product(q_tile, tl.trans(k_tile), PRECISION)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            peak, shift, shrink = raise_peak(peak, scores, scale)
            weights = exponentials(scores, scale, shift[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None]
            if part < 2:
                v_tile = load_tile(v, columns, dims, v_strides, inside, True, D)
                mean = multiply(weights.to(v_tile.dtype), v_tile, mean, PRECISION)
    mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
    store_tile(output, mean, rows, dims, output_strides, kept_rows, D)
    tl.store(statistics + wide(tl.program_id(1)) * tokens + rows, log_sum_exp(peak, total, scale), mask=kept_rows)


class LocalLayout(NamedTuple):
    """The token axis as the kernels see it; `span` is how many frames away still count as a token's own."""

    text_start: int
    text_tokens: int
    video_start: int
    frames: int
    frame_tokens: int
    span: int

    @classmethod
    def of(cls, grid: TokenGrid, span: int) -> LocalLayout:
        return cls(
            grid.text_slice.start,
            grid.text_tokens,
            grid.video_start,
            grid.frames,
            grid.tokens_per_frame,
            min(span, grid.frames),
        )

    def tile_count(self, size: int) -> int:
        """Tiles of `size` tokens that never straddle the text or a frame."""
        return tile_count(self.text_tokens, size) + self.frames * tile_count(self.frame_tokens, size)


def local_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: LocalLayout, scale: float, key_mask: Tensor | None, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """(attention `[B, H, N, D]` in the dtype of q, base-2 log-sum-exp float32 `[B, H, N]`).

    Args:
        q, k, v: `[B, H, N, D]`, any strides. scale: scale * log2(e), above 0. key_mask: bool `[B, N]`.
        renormalize: whether the softmax runs over what is seen, or over all keys.
    """
    batch, heads, tokens, head_dim = q.shape
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tiles = choose_tiles("local_forward", q)
    mask = statistics[0] if key_mask is None else key_mask
    launch(
        local_forward_kernel, (layout.tile_count(tiles.rows), batch * heads),
        q, k, v, output, statistics, mask, q.stride(), k.stride(), v.stride(), output.stride(), mask.stride(),
        heads, tokens, tuple(layout), scale,
        D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=tiles.rows, BLOCK_N=tiles.columns,
        PARTS=2 if renormalize else 4, HAS_MASK=key_mask is not None, PRECISION=product_precision(), tiles=tiles,
    )  # fmt: skip
    return output, statistics
