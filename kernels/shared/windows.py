"""Which query and key tokens a tile takes: flat stretches of a frame, and blocks with the rectangles of their windows.

With a window a tile of queries is a block of the frame as square as may be, and its keys are those of the smallest
rectangle that holds the windows of all its queries, walked row by row: a tile then costs what its pairs cost, and not
all tokens of the rows that it reaches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.configs import Tiles

OWN_PLACE = 1
GIVEN_CENTER = 2
_FAR = tl.constexpr(2**20)
# Places up to 2,048 in 15 bits each, with the guard bit of either.
_ROW = tl.constexpr(2**15)
_GUARD = tl.constexpr(2**29 + 2**14)
_OUTSIDE = tl.constexpr(2**13 - 1)


def window_kind(window: int, center: Tensor | None) -> int:
    """0 without a window, else where it lies."""
    if window < 0:
        return 0
    return OWN_PLACE if center is None else GIVEN_CENTER


def block_shape(tokens: int) -> tuple[int, int]:
    """(rows, columns) of a block of so many tokens, as `block_tokens` cuts them."""
    across = 4 if tokens <= 16 else 8 if tokens <= 64 else 16
    return tokens // across, across


def block_count(tokens: int, longest: int, height: int, width: int, window: int) -> int:
    """Tiles of a frame: of its `longest` stretch of tokens, or blocks of the whole frame where there is a window."""
    if window < 0:
        return -(-longest // tokens)
    down, across = block_shape(tokens)
    return -(-height // down) * -(-width // across)


def visited_pairs(height: int, width: int, radius: int, tiles: Tiles) -> int:
    """Scores in the tiles of one pair of whole frames, each query's window round its own place; see `needed_pairs`."""
    down, across = block_shape(tiles.rows)
    keys = 0
    for top in range(0, height, down):
        for left in range(0, width, across):
            high = min(min(top + down, height) + radius, height) - max(top - radius, 0)
            wide = min(min(left + across, width) + radius, width) - max(left - radius, 0)
            keys += -(-high * wide // tiles.columns) * tiles.columns
    return keys * tiles.rows


def needed_pairs(height: int, width: int, radius: int) -> int:
    """Pairs of a query and a key in its window, of one pair of whole frames."""
    high, wide = (
        sum(min(place + radius + 1, side) - max(place - radius, 0) for place in range(side)) for side in (height, width)
    )
    return high * wide


@triton.jit
def block_tokens(tile, first, stop, width, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """(tokens `[BLOCK]` of a frame, which of them lie in `first` to `stop`) of a tile of its tokens."""
    place = tl.arange(0, BLOCK)
    if WINDOW > 0:
        ACROSS: tl.constexpr = 4 if BLOCK <= 16 else (8 if BLOCK <= 64 else 16)
        blocks = tl.cdiv(width, ACROSS)
        x = tile % blocks * ACROSS + place % ACROSS
        tokens = (tile // blocks * (BLOCK // ACROSS) + place // ACROSS) * width + x
        return tokens, (x < width) & (tokens >= first) & (tokens < stop)
    else:
        tokens = first + tile * BLOCK + place
        return tokens, tokens < stop


@triton.jit
def load_centers(center, first, rows, kept, width, WINDOW: tl.constexpr):
    """Centre (x, y) of the window of each query `[M]`: its own place, or what `center [.., R, 2]` says."""
    if WINDOW == 2:
        pointers = center + (first + rows) * 2
        return tl.load(pointers, mask=kept, other=0), tl.load(pointers + 1, mask=kept, other=0)
    else:
        return rows % width, rows // width


@triton.jit
def extent(places, kept):
    """(lowest, highest) of the kept places; far apart and crossed where none is kept."""
    return tl.min(tl.where(kept, places, _FAR), 0), tl.max(tl.where(kept, places, -_FAR), 0)


@triton.jit
def window_rectangle(x, y, kept, radius, width, height):
    """(left, top, tokens across, tokens) of the smallest rectangle that holds the windows round the kept places.

    One token across counts as two, of which the second may lie outside the frame: see `rectangle_tokens`.
    """
    lowest_x, highest_x = extent(x, kept)
    lowest_y, highest_y = extent(y, kept)
    left, top = tl.maximum(lowest_x - radius, 0), tl.maximum(lowest_y - radius, 0)
    across = tl.maximum(tl.minimum(highest_x + radius + 1, width) - left, 2)
    down = tl.maximum(tl.minimum(highest_y + radius + 1, height) - top, 0)
    return left, top, across, across * down


@triton.jit
def reciprocal(across):
    """What `rectangle_tokens` multiplies by in place of a division: 2**32 / across, rounded up."""
    return 0xFFFFFFFF // tl.cast(across, tl.uint32) + 1


@triton.jit
def rectangle_tokens(place, count, left, top, across, inverse, first, stop, width):
    """(tokens, x, y, which are there) of the tokens `place` of a rectangle, counted row by row from its top left.

    The upper half of a product with `reciprocal(across)` is the exact quotient while place * across stays below 2**32,
    which `window_radius` sees to; `across` is at least 2.

    Args:
        count: tokens of the rectangle; first, stop: what the tensor holds of the frame.
    """
    down = tl.umulhi(tl.cast(place, tl.uint32), inverse).to(tl.int32)
    x, y = left + place - down * across, top + down
    tokens = y * width + x
    return tokens, x, y, (place < count) & (x < width) & (tokens >= first) & (tokens < stop)


@triton.jit
def place_code(x, y, kept):
    """One int32 for a place, y above x; that of a place which is not kept lies outside every window."""
    return tl.where(kept, y * _ROW + x, _OUTSIDE)


@triton.jit
def window_bounds(center_x, center_y, radius):
    """(lowest, highest) codes of windows, for `in_window`."""
    middle = center_y * _ROW + center_x
    reach = radius * (_ROW + 1)
    return middle - reach - _GUARD, middle + reach + _GUARD


@triton.jit
def in_window(code, lowest, highest):
    """Which places lie in which windows: four operations for both axes and both sides.

    Each difference has two fields of 15 bits, x and y, and a guard bit above each that a negative field clears.
    """
    return ((code - lowest) & (highest - code) & _GUARD) == _GUARD
