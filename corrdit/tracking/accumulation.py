"""Cost maps of frames that several chunks hold: averaged, or the first one kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from corrdit.tracking.chunks import Chunk


class ChunkCost(NamedTuple):
    """What one forward pass says about the tokens of its source frame.

    Attributes:
        tokens: int64 `[R]` flat tokens of the source frame, ascending.
        rows: float `[V, R, F, h, w]` V cost maps of each in every frame of the chunk, in their order.
        back: float `[F, h, w, 2]` for each token of every frame its best token (x, y) in the source frame; None where
            it was not asked for.
    """

    tokens: Tensor
    rows: Tensor
    back: Tensor | None


class FrameCost(NamedTuple):
    """Cost maps `[V, R, h, w]` of the source tokens in one target frame, and the way back `[h, w, 2]`."""

    rows: Tensor
    back: Tensor | None


class CostAccumulator:
    """Gives out each target frame once, when the last chunk that holds it has been seen.

    Only frames that a later chunk holds again are kept, so memory does not grow with the video where chunks do not
    overlap.

    Args:
        last_visits: for each frame the index of the last chunk with it.
        average: whether the maps of several chunks are averaged; otherwise the first stands.
    """

    def __init__(self, last_visits: dict[int, int], *, average: bool) -> None:
        self._last_visits = last_visits
        self._average = average
        self._pending: dict[int, tuple[FrameCost, int]] = {}

    def add(self, index: int, chunk: Chunk, cost: ChunkCost) -> Iterator[tuple[int, FrameCost]]:
        """Takes in chunk number `index`; yields (frame, cost) for the frames that are complete with it."""
        for place, frame in enumerate(chunk.frames):
            if frame == chunk.source:
                continue
            rows = cost.rows[:, :, place]
            back = None if cost.back is None else cost.back[place]
            if frame in self._pending:
                held, count = self._pending.pop(frame)
                rows = held.rows + rows if self._average else held.rows
                back, count = held.back, count + 1
            else:
                count = 1
            if self._last_visits[frame] == index:
                yield frame, FrameCost(rows / count if self._average and count > 1 else rows, back)
            else:
                # A copy, so that the rows of the chunk's other frames are freed.
                self._pending[frame] = (FrameCost(rows.clone(), back), count)
