"""Frame-local attention: which tokens see which.

A token axis is cut into stretches, the text and every frame, that a tile never straddles, so that what a tile sees is a
few runs of the other axis: the text, the frames near its own, and (for weights dropped after the softmax) the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from corrdit.kernels.shared.primitives import wide
from corrdit.kernels.shared.tables import no_modes, refuse_capture
from corrdit.problem import TokenAxis

Stretch = tuple[int, int]


def stretches(axis: TokenAxis, frames: int) -> list[int]:
    """(start, stop) in a token axis of the text and of every frame, flat; empty ones of what it does not hold."""
    held = (axis.frames[frame].place if frame in axis.frames else slice(0, 0) for frame in range(frames))
    return [limit for place in (axis.text, *held) for limit in (place.start, place.stop)]


class LocalTable(NamedTuple):
    """What the tokens of one axis see of another.

    Attributes:
        own: int32 `[1 + F, 2]` (start, stop) of the text and of every frame.
        runs: int32 `[n, 2]` (start, stop) in the other axis.
        starts: int32 `[2 * (1 + F) + 1]`: stretch g sees the runs `starts[2 g]` to `starts[2 g + 1]`; those up to
            `starts[2 g + 2]` are all others.
        longest: tokens of the longest stretch.
    """

    own: Tensor
    runs: Tensor
    starts: Tensor
    longest: int


def local_table(own: Sequence[int], other: Sequence[int], span: int, device: torch.device) -> LocalTable:
    """The table of two axes of `stretches`; frames up to `span` away count as a token's own. Seeing is mutual."""
    return _local_table(tuple(own), tuple(other), span, device)


def tables_made_outside(queries: Sequence[int], keys: Sequence[int], span: int, like: Tensor) -> None:
    """Makes the tables of a call before it; see `corrdit.kernels.shared.tables.made_outside`."""
    _make(tuple(queries), tuple(keys), span, like.device)


def _make(queries: tuple[int, ...], keys: tuple[int, ...], span: int, device: torch.device) -> bool:
    _local_table(queries, keys, span, device)
    _local_table(keys, queries, span, device)
    return True


_make._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _local_table(own: tuple[int, ...], other: tuple[int, ...], span: int, device: torch.device) -> LocalTable:
    refuse_capture(device)
    mine, theirs = (list(zip(axis[::2], axis[1::2], strict=True)) for axis in (own, other))
    starts, runs = [0], []
    for index in range(len(mine)):
        seen = [index == 0 or number == 0 or abs(index - number) <= span for number in range(len(theirs))]
        for wanted in (True, False):
            runs += joined([place for place, near in zip(theirs, seen, strict=True) if near == wanted])
            starts.append(len(runs))
    with no_modes():
        tables = (
            torch.tensor(numbers, dtype=torch.int32, device="cpu") for numbers in (mine, runs or [(0, 0)], starts)
        )
        of_own, of_runs, of_starts = (table.to(device) for table in tables)
    return LocalTable(of_own, of_runs, of_starts, max(stop - start for start, stop in mine))


def joined(places: Sequence[Stretch]) -> list[Stretch]:
    """The places that are not empty, in order, neighbours as one."""
    runs: list[Stretch] = []
    for start, stop in sorted(places):
        if start == stop:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


@triton.jit
def tile_stretch(tile, tiles, own, BLOCK: tl.constexpr):
    """(first token, stop of its stretch, number of the stretch) of a tile of `BLOCK` tokens, `tiles` a stretch."""
    stretch = tile // tiles
    return tl.load(own + 2 * stretch) + tile % tiles * BLOCK, tl.load(own + 2 * stretch + 1), stretch


@triton.jit
def visible_runs(starts, stretch, part: tl.constexpr, some_token):
    """(first, stop) of the runs that a stretch sees (part 0), or of all others (part 1); none without a token."""
    first = tl.load(starts + 2 * stretch + part)
    return first, tl.where(some_token, tl.load(starts + 2 * stretch + part + 1), first)


@triton.jit
def load_run(runs, index):
    """(start, stop) of a run."""
    return tl.load(runs + 2 * index), tl.load(runs + 2 * index + 1)


@triton.jit
def head_of(pointer, batch, head, strides):
    """The pointer at a head of a sample."""
    return pointer + wide(batch) * strides[0] + wide(head) * strides[1]
