"""Which blocks of score maps an operation over frame pairs visits, and which of their keys are allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.grid import FramePairs, TokenGrid

# Queries of a window are taken in tiles of about this many rows and columns: larger tiles reach over more keys that
# no window of theirs contains, smaller ones make the matrix products too small.
TILE_SIDE = 12
# Tiles that stand alike in their rectangle share one mask: the inner ones, and those at each border.
CACHED_WINDOWS = 25


class Region(NamedTuple):
    """A rectangle of tokens of a frame; `bottom` and `right` are exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def tokens(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


Part = slice | Region


class Run(NamedTuple):
    """Frame pairs (query_frame, key_frame + n), n < key_frames, that follow each other in the list of pairs."""

    query_frame: int
    key_frame: int
    key_frames: int
    pair: int

    @property
    def pairs(self) -> slice:
        """Where they are in the list of pairs."""
        return slice(self.pair, self.pair + self.key_frames)


class KeyGroup(NamedTuple):
    """Key frames that share one matrix product, and the runs of pairs within them."""

    frame: int
    frames: int
    runs: list[Run]


class PositionTable(NamedTuple):
    """Positions of the keys of a rectangle, counted from its top left corner.

    Attributes:
        sums: `[3, keys]` rows of ones, of x and of y: a product with it sums weights and weighted positions.
        columns: `[width]` x of each column.
        rows: `[height]` y of each row.
    """

    sums: Tensor
    columns: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Block:
    """A part of one query frame against the keys of one frame or more.

    Attributes:
        queries: tokens of the query frame.
        keys: rectangle of the key frame.
        removed: bool `[n or 1, key frames or 1, keys]`, True where a query must not attend; None without such keys.
        own: `[n, 1, 2]` positions (x, y) of the queries, counted from the corner of the rectangle.
        table: positions of the keys.
    """

    run: Run
    queries: Part
    keys: Region
    removed: Tensor | None
    own: Tensor
    table: PositionTable


def key_groups(pairs: FramePairs, frames_per_group: int) -> list[KeyGroup]:
    """The pairs sorted by key frame, in groups of `frames_per_group` key frames."""
    groups: dict[int, list[Run]] = {}
    for index, (i, j) in enumerate(pairs):
        runs = groups.setdefault(j // frames_per_group, [])
        last = runs[-1] if runs else None
        if last and last[0] == i and last.key_frame + last.key_frames == j and last.pair + last.key_frames == index:
            runs[-1] = last._replace(key_frames=last.key_frames + 1)
        else:
            runs.append(Run(i, j, 1, index))
    return [_spanning(runs) for _, runs in sorted(groups.items())]


def _spanning(runs: list[Run]) -> KeyGroup:
    first = min(run.key_frame for run in runs)
    end = max(run.key_frame + run.key_frames for run in runs)
    return KeyGroup(first, end - first, runs)


def take(tokens: Tensor, part: Part, grid: TokenGrid) -> Tensor:
    """View of part of the tokens `[..., S, D]` of a frame: `[..., n, D]`, or `[..., rows, columns, D]` for a region."""
    if isinstance(part, slice):
        return tokens[..., part, :]
    by_place = tokens.unflatten(-2, (grid.height, grid.width))
    return by_place[..., part.top : part.bottom, part.left : part.right, :]


def of_rows(vectors: Tensor, block: Block, grid: TokenGrid) -> Tensor:
    """The rows of a block `[n, frames, 2]` in a field `[P, S, 2]` of vectors."""
    part = take(vectors[block.run.pairs], block.queries, grid)
    return part.reshape(block.run.key_frames, -1, 2).transpose(0, 1)


class BlockPlan:
    """Cuts runs of frame pairs into blocks.

    Without a window a block is a chunk of query rows against whole key frames. With one it is a tile of queries
    against the rectangle that holds all their windows, so that work falls with the window; the keys that lie in the
    rectangle but not in a query's own window are masked.
    """

    def __init__(
        self,
        grid: TokenGrid,
        *,
        rows: int,
        key_mask: Tensor | None,
        window: int | None,
        center: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.grid = grid
        self.rows = rows
        self.window = window
        self._removed = None if key_mask is None else ~key_mask
        self._positions = grid.coordinates(device, dtype)
        self._centers = None
        if window is not None and center is not None:
            self._centers = nearest_tokens(center, grid).to(dtype)
        self._table = lru_cache(CACHED_WINDOWS)(self._new_table)
        self._outside = lru_cache(CACHED_WINDOWS)(self._new_outside)

    @property
    def may_leave_rows_empty(self) -> bool:
        """Whether a query can be left without any key: a window always holds its own centre."""
        return self._removed is not None

    def blocks(self, batch: int, runs: list[Run]) -> Iterator[Block]:
        """The blocks of some runs."""
        for run in runs:
            yield from self._chunks(batch, run) if self.window is None else self._tiles(batch, run, self.window)

    def _chunks(self, batch: int, run: Run) -> Iterator[Block]:
        grid = self.grid
        removed = None
        if self._removed is not None:
            start = grid.frame_slice(run.key_frame).start
            keys = self._removed[batch, start : start + run.key_frames * grid.tokens_per_frame]
            removed = keys.reshape(1, run.key_frames, grid.tokens_per_frame)
        table = self._table(grid.height, grid.width)
        for start in range(0, grid.tokens_per_frame, self.rows):
            queries = slice(start, min(start + self.rows, grid.tokens_per_frame))
            yield Block(
                run, queries, Region(0, grid.height, 0, grid.width), removed, self._positions[queries, None], table
            )

    def _tiles(self, batch: int, run: Run, window: int) -> Iterator[Block]:
        for tile in query_tiles(self.grid, self.rows):
            if self._centers is None:
                keys = self._reach(tile, window)
                own, removed = self._outside(
                    tile.bottom - tile.top, tile.right - tile.left, tile.top - keys.top, tile.left - keys.left,
                    keys.bottom - keys.top, keys.right - keys.left, window,
                )  # fmt: skip
            else:
                middle = take(self._centers[batch, run.pair].flatten(0, 1), tile, self.grid).reshape(-1, 2)
                (left, top), (right, bottom) = middle.amin(0).long().tolist(), middle.amax(0).long().tolist()
                keys = self._reach(Region(top, bottom + 1, left, right + 1), window)
                corner = middle.new_tensor([keys.left, keys.top])
                own = take(self._positions, tile, self.grid).reshape(-1, 1, 2) - corner
                table = self._table(keys.bottom - keys.top, keys.right - keys.left)
                removed = outside_window(middle - corner, table, window)
            if self._removed is not None:
                of_frame = self._removed[batch, self.grid.frame_slice(run.key_frame), None]
                removed = removed | take(of_frame, keys, self.grid).reshape(1, 1, -1)
            table = self._table(keys.bottom - keys.top, keys.right - keys.left)
            yield Block(run, tile, keys, removed, own, table)

    def _reach(self, places: Region, window: int) -> Region:
        """The tokens within a window of any of the places."""
        return Region(
            max(0, places.top - window),
            min(self.grid.height, places.bottom + window),
            max(0, places.left - window),
            min(self.grid.width, places.right + window),
        )

    def _new_table(self, height: int, width: int) -> PositionTable:
        return position_table(height, width, self._positions)

    def _new_outside(
        self, tile_height: int, tile_width: int, top: int, left: int, height: int, width: int, window: int
    ) -> tuple[Tensor, Tensor]:
        """Own positions and removed keys of a tile that stands at (top, left) of its rectangle of keys."""
        tile = self._table(tile_height, tile_width)
        own = tile.sums[1:].t() + tile.sums.new_tensor([left, top])
        return own.unsqueeze(1), outside_window(own, self._table(height, width), window)


def position_table(height: int, width: int, like: Tensor) -> PositionTable:
    """The table of a rectangle, in the dtype and on the device of `like`."""
    columns = torch.arange(width, dtype=like.dtype, device=like.device)
    rows = torch.arange(height, dtype=like.dtype, device=like.device)
    x, y = columns.expand(height, width), rows.unsqueeze(1).expand(height, width)
    return PositionTable(torch.stack((torch.ones_like(x), x, y)).flatten(1), columns, rows)


def outside_window(middle: Tensor, table: PositionTable, window: int) -> Tensor:
    """bool `[n, 1, keys]`: keys further than `window` from the middles `[n, 2]` in either axis."""
    column_outside = (table.columns - middle[:, :1]).abs() > window
    row_outside = (table.rows - middle[:, 1:]).abs() > window
    return (row_outside.unsqueeze(2) | column_outside.unsqueeze(1)).flatten(1).unsqueeze(1)


def query_tiles(grid: TokenGrid, most: int) -> Iterator[Region]:
    """Rectangles of at most `most` tokens that cover a frame."""
    height = min(TILE_SIDE, grid.height, most)
    width = min(TILE_SIDE, grid.width, most // height)
    for top in range(0, grid.height, height):
        for left in range(0, grid.width, width):
            yield Region(top, min(top + height, grid.height), left, min(left + width, grid.width))


def nearest_tokens(center: Tensor, grid: TokenGrid) -> Tensor:
    """int64 positions (x, y) of the tokens nearest to `[..., 2]`, moved into the frame."""
    last = torch.tensor([grid.width - 1, grid.height - 1], device=center.device, dtype=center.dtype)
    return center.round().clamp(min=torch.zeros_like(last), max=last).long()
