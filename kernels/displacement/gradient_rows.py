"""What the gradient kernels of soft displacement read of each query: its gradient as planes, the shift of its softmax.

The size of a row's gradient goes into the exponent of its softmax weights, where it costs nothing for an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.configs import Tiles
from corrdit.kernels.shared.launch import LOG2_E, launch, tile_count
from corrdit.kernels.shared.primitives import (
    COORDINATE_LANES,
    GRADIENT_LANES,
    exponentials,
    gradient_planes,
    gradient_shift,
    product,
    query_frame,
    wide,
)
from corrdit.kernels.shared.tables import FramePairTable

LOG2_E_CONSTANT = tl.constexpr(LOG2_E)
# Element by element: one size does for every device.
_GRADIENT_ROWS = Tiles(256, 16, 16, 4, 1)


@triton.jit
def gradient_rows_kernel(
    gradient, grad_level, displacement, statistics, ranges, planes, shifts, pairs, row_count, tiles, width, group,
    HAS_GRADIENT: tl.constexpr, HAS_LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of rows of a pair, batch * head): gradient planes `[.., 8]` and shift of each row of `[B, H, R]`.

    Args:
        gradient: `[B, H, R, 2]` of the displacement, grad_level: `[B, H, R]` of its log-sum-exp in base 2.
    """
    _, first, stop, row_place = query_frame(pairs, tl.program_id(0) // tiles)
    token = first + tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    kept = token < stop
    rows = wide(tl.program_id(1)) * row_count + row_place + token
    level = tl.load(statistics + rows, mask=kept, other=float("inf"))
    # A row without keys has no gradient, whatever comes in.
    some_key = kept & (level != float("inf"))
    grad_x = tl.zeros([BLOCK], tl.float32)
    grad_y = tl.zeros([BLOCK], tl.float32)
    of_level = tl.zeros([BLOCK], tl.float32)
    if HAS_GRADIENT:
        grad_x = tl.load(gradient + rows * 2, mask=some_key, other=0.0)
        grad_y = tl.load(gradient + rows * 2 + 1, mask=some_key, other=0.0)
    if HAS_LEVEL:
        of_level = tl.load(grad_level + rows, mask=some_key, other=0.0) * LOG2_E_CONSTANT
    mean_x = tl.load(displacement + rows * 2, mask=kept, other=0.0) + (token % width).to(tl.float32)
    mean_y = tl.load(displacement + rows * 2 + 1, mask=kept, other=0.0) + (token // width).to(tl.float32)
    tile, norm = gradient_planes(grad_x, grad_y, mean_x, mean_y, of_level)
    lanes = tl.arange(0, GRADIENT_LANES)
    places = planes + rows[:, None] * GRADIENT_LANES + lanes[None, :]
    tl.store(places, tile.to(planes.dtype.element_ty), mask=kept[:, None])
    shift = gradient_shift(level, norm, tl.load(ranges + tl.program_id(1) // group))
    tl.store(shifts + rows, shift, mask=kept)


@triton.jit
def load_gradient_rows(planes, shifts, first_row, rows, kept_rows, GUARD: tl.constexpr):
    """(gradient planes `[M, 16]`, shift `[M]` of the exponent) of a tile of query rows of one frame pair."""
    lanes = tl.arange(0, COORDINATE_LANES)
    places = planes + first_row * GRADIENT_LANES + rows[:, None] * GRADIENT_LANES + lanes[None, :]
    real = (lanes < GRADIENT_LANES)[None, :]
    if GUARD:
        tile = tl.load(places, mask=kept_rows[:, None] & real, other=0.0)
        return tile, tl.load(shifts + first_row + rows, mask=kept_rows, other=float("inf"))
    else:
        return tl.load(places, mask=real, other=0.0), tl.load(shifts + first_row + rows)


@triton.jit
def logit_gradients(scores, scale, shift, left, right, PRECISION: tl.constexpr):
    """dlogit relative to the largest gradient: the softmax weights times g.(p' - e).

    Args:
        scores: `[M, N]` with shift `[M, 1]`, gradient planes `left [M, 16]` and coordinates `right [N, 16]`; or all
            transposed, `[N, M]` with `[1, M]`, coordinates `left` and planes `right`.
    """
    towards = product(left, tl.trans(right), PRECISION)
    return exponentials(scores, scale, shift) * towards


def gradient_rows(
    gradient: Tensor | None,
    grad_level: Tensor | None,
    displacement: Tensor,
    statistics: Tensor,
    dtype: torch.dtype,
    table: FramePairTable,
    group: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradient kernels read of each row of `[B, H, R]`.

    Args:
        gradient: `[B, H, R, 2]` of the displacement, grad_level: `[B, H, R]` of `statistics`; None for 0.
        group: heads that share a range, those of one key head.

    Returns:
        planes `[B, H, R, 8]` in `dtype`, shifts float32 `[B, H, R]`, and ranges float32 `[B, H / group]`: the largest
        finite |g| of those heads, 1 where all are 0.
    """
    batch, heads, rows = statistics.shape
    given = [of.contiguous() for of in (gradient, grad_level) if of is not None]
    largest = torch.stack([of.abs().masked_fill(~of.isfinite(), 0.0).flatten(2).amax(-1) for of in given]).amax(0)
    if grad_level is not None:
        largest = largest * LOG2_E  # as the kernel reads it
    largest = largest.unflatten(1, (-1, group)).amax(-1)
    ranges = torch.where(largest == 0, torch.ones_like(largest), largest)
    planes = torch.empty(*statistics.shape, 8, dtype=dtype, device=statistics.device)
    shifts = torch.empty_like(statistics)
    blocks = tile_count(table.longest, _GRADIENT_ROWS.rows)
    launch(
        gradient_rows_kernel, (len(table.pairs) * blocks, batch * heads),
        given[0], given[-1], displacement, statistics, ranges, planes, shifts, table.pairs, rows, blocks, table.width,
        group, HAS_GRADIENT=gradient is not None, HAS_LEVEL=grad_level is not None, BLOCK=_GRADIENT_ROWS.rows,
        tiles=_GRADIENT_ROWS,
    )  # fmt: skip
    return planes, shifts, ranges
