"""Small device tables the kernels read: coordinates of a frame, frame pairs, window centres."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.problem import PairProblem

LANES = 16
_LARGEST_SIDE = 2048


class FramePairTable(NamedTuple):
    """Frame pairs as the kernels walk them. A place is where token 0 of a frame would stand in a tensor's token axis.

    Attributes:
        pairs: int32 `[P, 8]`: place, first token and stop of what q holds of the query frame, the same of k and the key
            frame, the place of the pair's rows in an axis of R, and its first row of those of its run.
        queries, keys: int32 `[F, 3]`: place, first token and stop of every frame; first == stop where nothing is held.
        query_starts: int32 `[F + 1]`, query_order: int32 `[P]`: the pairs of query frame i are
            `query_order[query_starts[i] : query_starts[i + 1]]`, in rising order.
        key_starts, key_order: the same by key frame.
        query_runs: int32 `[N, 8]`: runs of pairs of one key frame whose queries follow each other in q: place of the
            first query, how many, first entry of `key_order` and stop, what k holds of the key frame as above, and 0.
        rows: R, the queries of all pairs. longest: the most tokens that a frame has in q or k.
        longest_run: the most queries of a run.
        whole: whether q and k hold every frame whole. height, width: of a frame.
    """

    pairs: Tensor
    queries: Tensor
    keys: Tensor
    query_starts: Tensor
    query_order: Tensor
    key_starts: Tensor
    key_order: Tensor
    query_runs: Tensor
    rows: int
    longest: int
    longest_run: int
    whole: bool
    height: int
    width: int

    @property
    def frames(self) -> int:
        return self.queries.shape[0]

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width


def whole_frames(frames: int, frame_tokens: int) -> list[int]:
    """(place, first token, stop) of every frame of a tensor that holds them all; see `TokenAxis.places`."""
    return [number for frame in range(frames) for number in (frame * frame_tokens, 0, frame_tokens)]


Places = tuple[list[int], list[int], int, int]
"""What q and k hold of every frame, see `TokenAxis.places`, and height and width of a frame."""


def pair_places(problem: PairProblem) -> tuple[list[int], Places]:
    """The pairs (i0, j0, i1, j1, ...) of a problem, and where their tokens are."""
    grid = problem.grid
    pairs = [frame for pair in problem.pairs for frame in pair]
    return pairs, (problem.queries.places(grid.frames), problem.keys.places(grid.frames), grid.height, grid.width)


def row_count(pairs: Sequence[int], queries: Sequence[int]) -> int:
    """R: the queries that q holds of the pairs (i0, j0, i1, j1, ...) together."""
    return sum(queries[3 * i + 2] - queries[3 * i + 1] for i in pairs[::2])


def frame_pairs(
    flat: Sequence[int], queries: Sequence[int], keys: Sequence[int], height: int, width: int, device: torch.device
) -> FramePairTable:
    """The table of the pairs (i0, j0, i1, j1, ...) of frames that q and k hold as `TokenAxis.places` says."""
    return _frame_pairs(tuple(flat), tuple(queries), tuple(keys), height, width, device)


def made_outside(
    flat: Sequence[int], queries: Sequence[int], keys: Sequence[int], height: int, width: int, like: Tensor
) -> None:
    """Makes the tables of a call before it, where none of them is part of a graph.

    `torch.compile` calls this once, as it traces a caller: the first call of an operator may already be captured, and
    what is allocated in a capture belongs to the graph.
    """
    _make(tuple(flat), tuple(queries), tuple(keys), height, width, like.dtype, like.device)


def _make(
    flat: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...], height: int, width: int,
    dtype: torch.dtype, device: torch.device,
) -> bool:  # fmt: skip
    _frame_pairs(flat, queries, keys, height, width, device)
    coordinate_table(height, width, dtype, device)
    return True


def segments_made_outside(segments: Sequence[int], like: Tensor) -> None:
    """The same for `token_segments`."""
    _make_segments(tuple(segments), like.device)


def _make_segments(segments: tuple[int, ...], device: torch.device) -> bool:
    token_segments(segments, device)
    return True


for _function in (_make, _make_segments):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]


def refuse_capture(device: torch.device) -> None:
    """Raises a RuntimeError where a table would be made while a CUDA graph is captured, whose memory is the graph's."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of an operation with these frames is being captured in a CUDA graph; call it once before "
            "the capture, which makes the small tables that the kernels read"
        )


# Never evicted: a captured CUDA graph keeps reading the tables its warm-up made, and they are a few kilobytes each.
@functools.cache
def _frame_pairs(
    flat: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...], height: int, width: int,
    device: torch.device,
) -> FramePairTable:  # fmt: skip
    refuse_capture(device)
    with no_modes():
        axes = [torch.tensor(places, dtype=torch.int32, device="cpu").reshape(-1, 3) for places in (queries, keys)]
        held = [places[:, 2] - places[:, 1] for places in axes]
        both = torch.tensor(flat, dtype=torch.int64, device="cpu").reshape(-1, 2)
        pairs = torch.zeros(len(both), 8, dtype=torch.int32, device="cpu")
        pairs[:, 0:3], pairs[:, 3:6] = axes[0][both[:, 0]], axes[1][both[:, 1]]
        counts = held[0][both[:, 0]]
        # Of a pair's row for token 0 of the frame, though the first row is that of the first held token.
        pairs[:, 6] = counts.cumsum(0) - counts - pairs[:, 1]
        tables = [pairs, *axes]
        for column in (0, 1):
            of_frame = both[:, column]
            in_frame = torch.bincount(of_frame, minlength=len(axes[0]))
            tables += [torch.cat((in_frame.new_zeros(1), in_frame.cumsum(0))), of_frame.argsort(stable=True)]
        runs = _query_runs(pairs, both[:, 1].tolist(), tables[-1].tolist())
        tables.append(runs)
        on_device = [table.to(device=device, dtype=torch.int32).contiguous() for table in tables]
        longest = int(torch.stack(held).max())
        of_pairs, of_queries, of_keys, *orders = on_device
        query_starts, query_order, key_starts, key_order, query_runs = orders
        return FramePairTable(
            of_pairs, of_queries, of_keys, query_starts, query_order, key_starts, key_order, query_runs,
            row_count(flat, queries), longest, int(runs[:, 1].max()),
            all(bool((of == height * width).all()) for of in held), height, width,
        )  # fmt: skip


def _query_runs(pairs: Tensor, key_frames: Sequence[int], order: Sequence[int]) -> Tensor:
    """See `FramePairTable.query_runs`; writes the last column of `pairs`."""
    runs: list[list[int]] = []
    frame_of_run = None
    for entry, pair in enumerate(order):
        place, first, stop, *of_key = pairs[pair, :6].tolist()
        if frame_of_run != key_frames[pair] or runs[-1][0] + runs[-1][1] != place + first:
            runs.append([place + first, 0, entry, entry, *of_key, 0])
            frame_of_run = key_frames[pair]
        pairs[pair, 7] = runs[-1][1]
        runs[-1][1] += stop - first
        runs[-1][3] = entry + 1
    return torch.tensor(runs, dtype=torch.int32, device="cpu").reshape(-1, 8)


@functools.cache
def token_segments(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 `[G, 2]` (first token, tokens) of stretches of the token axis; kept as long as the process, like pairs."""
    refuse_capture(device)
    with no_modes():
        return torch.tensor(segments, dtype=torch.int32, device="cpu").reshape(-1, 2).to(device)


def no_modes() -> contextlib.AbstractContextManager[None]:
    """Inside, tensors are real: a mode, such as that of fake ones, would leave its own in a cache that outlives it."""
    guard: contextlib.AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return guard


def coordinate_table(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[h * w, 16]` rows (1, x, y, 1, x, y, 0, ...): what softmax weights are multiplied with on tensor cores.

    float16 for 16-bit input: whole numbers up to 2048 are exact in it, and the weights keep eleven bits where bfloat16
    would keep eight. float32 for float32 input. The second triple takes the rests of the gradient planes.

    Raises:
        ValueError: a frame more than 2048 tokens wide or high.
    """
    if max(height, width) > _LARGEST_SIDE:
        raise ValueError(
            f"the Triton kernels take up to {_LARGEST_SIDE} x {_LARGEST_SIDE} tokens a frame, got {height} x {width}; "
            'use backend="streaming"'
        )
    return _coordinates(height, width, torch.float32 if dtype == torch.float32 else torch.float16, device)


@functools.cache
def _coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    refuse_capture(device)
    with no_modes():
        row = torch.arange(height, device="cpu").repeat_interleave(width)
        column = torch.arange(width, device="cpu").repeat(height)
        table = torch.zeros(height * width, LANES, dtype=dtype, device="cpu")
        table[:, :6] = torch.stack((torch.ones_like(row), column, row), dim=-1).repeat(1, 2)
        # Waits for the copy: other threads and streams take the table from the cache.
        return table.to(device)


def window_centers(problem: PairProblem) -> Tensor | None:
    """int32 `[B, R, 2]` tokens (x, y): centres rounded to the nearest token and moved into the frame."""
    if problem.center is None:
        return None
    x = problem.center[..., 0].round().clamp(0, problem.grid.width - 1)
    y = problem.center[..., 1].round().clamp(0, problem.grid.height - 1)
    return torch.stack((x, y), dim=-1).to(torch.int32).contiguous()


def window_radius(problem: PairProblem) -> int:
    """The radius as the kernels read it: -1 without a window."""
    if problem.window is None:
        return -1
    return min(problem.window, max(problem.grid.height, problem.grid.width))
