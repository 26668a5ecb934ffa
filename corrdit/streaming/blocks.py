"""Which blocks of score maps an operation over frame pairs visits, and which of their keys are allowed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem

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


def key_groups(problem: PairProblem, frames_per_group: int) -> list[KeyGroup]:
    """The pairs whose keys are there, sorted by key frame, in groups of `frames_per_group` key frames."""
    groups: dict[int, list[Run]] = {}
    for index, (i, j) in enumerate(problem.pairs):
        if j not in problem.keys.frames:
            continue
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


def take(tokens: Tensor, part: Part, origin: int, grid: TokenGrid) -> Tensor:
    """View of part of a frame's tokens, whose token 0 stands (or would) at `origin` in `[..., tokens, D]`.

    Returns:
        `[..., n, D]`, or `[..., rows, columns, D]` for a region.
    """
    if isinstance(part, slice):
        return tokens[..., origin + part.start : origin + part.stop, :]
    start = origin + part.top * grid.width + part.left
    columns = part.right - part.left
    stop = start + (part.bottom - part.top - 1) * grid.width + columns
    return tokens[..., start:stop, :].unfold(-2, columns, grid.width).movedim(-1, -2)


class BlockPlan:
    """Cuts runs of frame pairs into blocks.

    Without a window a block is a chunk of query rows against whole key frames. With one it is a tile of queries
    against the rectangle that holds all their windows, so that work falls with the window; the keys that lie in the
    rectangle but not in a query's own window are masked.
    """

    def __init__(self, problem: PairProblem, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.problem = problem
        self.grid = problem.grid
        self.rows = rows
        mask = problem.video_mask()
        self._removed = None if mask is None else ~mask.to(device)
        self._positions = self.grid.coordinates(device, dtype)
        self._pair_rows = problem.pair_rows()
        self._centers = None
        if problem.window is not None and problem.center is not None:
            self._centers = nearest_tokens(problem.center, self.grid).to(dtype)
        self._table = lru_cache(CACHED_WINDOWS)(self._new_table)
        self._outside = lru_cache(CACHED_WINDOWS)(self._new_outside)

    @property
    def may_leave_rows_empty(self) -> bool:
        """Whether a query can be left without any key: a window always holds its own centre."""
        return self._removed is not None

    def blocks(self, batch: int, runs: list[Run]) -> Iterator[Block]:
        """The blocks of some runs."""
        window = self.problem.window
        for run in runs:
            yield from self._chunks(batch, run) if window is None else self._tiles(batch, run, window)

    def of_block(self, field: Tensor, block: Block) -> Tensor:
        """View of the rows of a block in `[R, D]` of all pairs: `[frames, n, D]`, a region's as rows and columns."""
        held = self.problem.queries.frames[block.run.query_frame]
        start = self._pair_rows[block.run.pair].start
        of_run = field[start : start + block.run.key_frames * held.tokens]
        return take(of_run.unflatten(0, (-1, held.tokens)), block.queries, -held.first, self.grid)

    def _removed_keys(self, batch: int, run: Run) -> Tensor | None:
        """bool `[key frames, S]`."""
        if self._removed is None:
            return None
        of_frames = self._removed[batch % len(self._removed)].unflatten(0, (-1, self.grid.tokens_per_frame))
        return of_frames[run.key_frame : run.key_frame + run.key_frames]

    def _chunks(self, batch: int, run: Run) -> Iterator[Block]:
        grid, held = self.grid, self.problem.queries.frames[run.query_frame]
        removed = self._removed_keys(batch, run)
        table = self._table(grid.height, grid.width)
        for start in range(held.first, held.stop, self.rows):
            queries = slice(start, min(start + self.rows, held.stop))
            keys = Region(0, grid.height, 0, grid.width)
            of_rows = None if removed is None else removed.unsqueeze(0)
            yield Block(run, queries, keys, of_rows, self._positions[queries, None], table)

    def _tiles(self, batch: int, run: Run, window: int) -> Iterator[Block]:
        held = self.problem.queries.frames[run.query_frame]
        of_frame = self._removed_keys(batch, run)
        for tile in query_tiles(self.grid, self.rows, held.first, held.stop):
            if self._centers is None:
                keys = self._reach(tile, window)
                own, removed = self._outside(
                    tile.bottom - tile.top, tile.right - tile.left, tile.top - keys.top, tile.left - keys.left,
                    keys.bottom - keys.top, keys.right - keys.left, window,
                )  # fmt: skip
                table = self._table(keys.bottom - keys.top, keys.right - keys.left)
            else:
                centers = self._centers[batch, self._pair_rows[run.pair]]
                middle = take(centers, tile, -held.first, self.grid).reshape(-1, 2)
                (left, top), (right, bottom) = middle.amin(0).long().tolist(), middle.amax(0).long().tolist()
                keys = self._reach(Region(top, bottom + 1, left, right + 1), window)
                corner = middle.new_tensor([keys.left, keys.top])
                own = take(self._positions, tile, 0, self.grid).reshape(-1, 1, 2) - corner
                table = self._table(keys.bottom - keys.top, keys.right - keys.left)
                removed = outside_window(middle - corner, table, window)
            if of_frame is not None:
                removed = removed | take(of_frame.unsqueeze(-1), keys, 0, self.grid).reshape(1, 1, -1)
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


def query_tiles(grid: TokenGrid, most: int, first: int, stop: int) -> Iterator[Region]:
    """Rectangles of at most `most` tokens that cover tokens `first` to `stop` of a frame."""
    for part in _rectangles(first, stop, grid.width):
        height = min(TILE_SIDE, part.bottom - part.top, most)
        width = min(TILE_SIDE, part.right - part.left, most // height)
        for top in range(part.top, part.bottom, height):
            for left in range(part.left, part.right, width):
                yield Region(top, min(top + height, part.bottom), left, min(left + width, part.right))


def _rectangles(first: int, stop: int, width: int) -> Iterator[Region]:
    """The rest of a started row, the rows that are whole, the start of the last one."""
    while first < stop:
        row, column = divmod(first, width)
        rows = (stop - first) // width if column == 0 else 0
        if rows:
            yield Region(row, row + rows, 0, width)
            first += rows * width
        else:
            end = min(stop, (row + 1) * width)
            yield Region(row, row + 1, column, end - row * width)
            first = end


def nearest_tokens(center: Tensor, grid: TokenGrid) -> Tensor:
    """int64 positions (x, y) of the tokens nearest to `[..., 2]`, moved into the frame."""
    last = torch.tensor([grid.width - 1, grid.height - 1], device=center.device, dtype=center.dtype)
    return center.round().clamp(min=torch.zeros_like(last), max=last).long()
