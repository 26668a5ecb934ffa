"""Which query and key tokens a tile takes: flat stretches of a frame, or blocks where there are windows.

With a window a tile of queries is a block of the frame as square as may be, and so is a tile of keys; those that cover
the windows of all queries are visited. From one such tile to the next the places of its keys differ by one number, so
that a key takes no more than the test of its window.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.configs import Tiles

OWN_PLACE = 1
GIVEN_CENTER = 2
_FAR = tl.constexpr(2**20)
# x in the lower 15 bits, y above: a difference that is negative in x sets bit 14, one that is negative in y the sign.
_ROW = tl.constexpr(2**15)
_NEGATIVE = tl.constexpr(2**14 - 2**31)
_OUTSIDE = tl.constexpr(-(2**28))


def window_kind(window: int, center: Tensor | None) -> int:
    """0 without a window, else where it lies."""
    if window < 0:
        return 0
    return OWN_PLACE if center is None else GIVEN_CENTER


@triton.constexpr_function
def block_width(tokens: int) -> int:
    """Tokens across a block of so many, as `block_tokens` and `window_tiles` cut them."""
    return 4 if tokens <= 16 else 8 if tokens <= 64 else 16


def block_shape(tokens: int) -> tuple[int, int]:
    """(rows, columns) of a block of so many tokens."""
    across = int(block_width(tokens))
    return tokens // across, across


def block_count(tokens: int, longest: int, height: int, width: int, window: int) -> int:
    """Tiles of a frame: of its `longest` stretch of tokens, or blocks of the whole frame where there is a window."""
    if window < 0:
        return -(-longest // tokens)
    down, across = block_shape(tokens)
    return -(-height // down) * -(-width // across)


def visited_pairs(height: int, width: int, radius: int, tiles: Tiles) -> int:
    """Scores in the tiles of one pair of whole frames, each query's window round its own place; see `needed_pairs`."""
    sides = zip((height, width), block_shape(tiles.rows), block_shape(tiles.columns), strict=True)
    down, across = (
        sum(-(-(min(start + block + radius, side) - max(start - radius, 0)) // step) for start in range(0, side, block))
        for side, block, step in sides
    )
    return down * across * tiles.rows * tiles.columns


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
        ACROSS: tl.constexpr = block_width(BLOCK)
        blocks = tl.cdiv(width, ACROSS)
        x = tile % blocks * ACROSS + place % ACROSS
        tokens = (tile // blocks * (BLOCK // ACROSS) + place // ACROSS) * width + x
        return tokens, (x < width) & (tokens >= first) & (tokens < stop)
    else:
        tokens = first + tile * BLOCK + place
        return tokens, tokens < stop


@triton.jit
def held_tokens(tokens, first, stop):
    """The tokens, or the nearest ones from `first` to `stop`: what may be read of a frame of which some is held."""
    return tl.minimum(tl.maximum(tokens, first), stop - 1)


@triton.jit
def stretch_tokens(place, count, first):
    """(tokens, which are there) of the tokens `place` of a stretch of `count` from `first` on; `first` for the others.

    Places are compared with the count, not tokens with the end, which takes 30 registers less in a loop.
    """
    inside = place < count
    return tl.where(inside, first + place, first), inside


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
def window_tiles(x, y, kept, radius, width, height, BLOCK: tl.constexpr):
    """(left, top, tiles across, tiles) of the fewest tiles that cover the windows round the kept places."""
    ACROSS: tl.constexpr = block_width(BLOCK)
    DOWN: tl.constexpr = BLOCK // ACROSS
    left, across = covering_tiles(x, kept, radius, width, ACROSS)
    top, down = covering_tiles(y, kept, radius, height, DOWN)
    return left, top, tl.maximum(across, 1), across * down


@triton.jit
def covering_tiles(places, kept, radius, side, STEP: tl.constexpr):
    """(where the first tile begins, tiles) along one axis; none where no place is kept."""
    lowest, highest = extent(places, kept)
    start = tl.maximum(lowest - radius, 0)
    stop = tl.minimum(highest + radius + 1, side)
    return start, tl.cdiv(tl.maximum(stop - start, 0), STEP)


@triton.jit
def reciprocal(across):
    """What `tile_corner` multiplies by in place of a division."""
    return 0xFFFFFFFF // tl.cast(across, tl.uint32)


@triton.jit
def tile_corner(tile, left, top, across, inverse, BLOCK: tl.constexpr):
    """(x, y) of the first place of one of `window_tiles`.

    The upper half of (tile + 1) * `reciprocal(across)` is the exact quotient of up to 2**32 / (across + 1) tiles, and a
    frame has at most 512 x 512: what the reciprocal falls short of 2**32 / across adds up to less than 1 / across.
    """
    ACROSS: tl.constexpr = block_width(BLOCK)
    down = tl.umulhi(tl.cast(tile + 1, tl.uint32), inverse).to(tl.int32)
    return left + (tile - down * across) * ACROSS, top + down * (BLOCK // ACROSS)


@triton.jit
def tile_tokens(x, y, width, BLOCK: tl.constexpr):
    """`[BLOCK]` tokens of the tile from (x, y) on; some may lie past the end of a token row, or of the frame."""
    ACROSS: tl.constexpr = block_width(BLOCK)
    place = tl.arange(0, BLOCK)
    return y * width + x + (place // ACROSS * width + place % ACROSS)


@triton.jit
def tile_codes(BLOCK: tl.constexpr):
    """`[BLOCK]` codes of a tile's places, less that of the first one."""
    ACROSS: tl.constexpr = block_width(BLOCK)
    place = tl.arange(0, BLOCK)
    return place_code(place % ACROSS, place // ACROSS)


@triton.jit
def place_code(x, y):
    """One int32 for a place, y above x."""
    return y * _ROW + x


@triton.jit
def window_bounds(center_x, center_y, radius, width, height):
    """(lowest, highest) codes of windows, inside the frame, for `in_window`."""
    lowest = place_code(center_x - radius, center_y - radius)
    return lowest, place_code(tl.minimum(center_x + radius, width - 1), tl.minimum(center_y + radius, height - 1))


@triton.jit
def in_window(code, lowest, highest):
    """Which places lie in which windows: three operations for both axes and both sides."""
    return (((code - lowest) | (highest - code)) & _NEGATIVE) == 0


@triton.jit
def seen_keys(codes, kept, lowest, highest, GUARD: tl.constexpr):
    """`[M, N]` which keys of places `codes [N]` lie in the windows `[M]`; if GUARD, only of those that are kept."""
    if GUARD:
        codes = tl.where(kept, codes, _OUTSIDE)
    return in_window(codes[None, :], lowest[:, None], highest[:, None])
