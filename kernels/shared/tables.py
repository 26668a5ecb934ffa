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
    """Frame pairs as a kernel walks them.

    Attributes:
        pairs: int32 `[P, 2]` (query frame, key frame).
        query_starts: int32 `[F + 1]`, query_order: int32 `[P]`: the pairs of query frame i are
            `query_order[query_starts[i] : query_starts[i + 1]]`, in rising order.
        key_starts, key_order: the same by key frame.
    """

    pairs: Tensor
    query_starts: Tensor
    query_order: Tensor
    key_starts: Tensor
    key_order: Tensor


def frame_pairs(flat: Sequence[int], frames: int, device: torch.device) -> FramePairTable:
    """The table of the pairs (i0, j0, i1, j1, ...)."""
    return _frame_pairs(tuple(flat), frames, device)


def made_outside(flat: Sequence[int], frames: int, height: int, width: int, like: Tensor) -> None:
    """Makes the tables of a call before it, where none of them is part of a graph.

    `torch.compile` calls this once, as it traces a caller: the first call of an operator may already be captured, and
    what is allocated in a capture belongs to the graph.
    """
    _make(tuple(flat), frames, height, width, like.dtype, like.device)


def _make(
    flat: tuple[int, ...], frames: int, height: int, width: int, dtype: torch.dtype, device: torch.device
) -> bool:
    _frame_pairs(flat, frames, device)
    coordinate_table(height, width, dtype, device)
    return True


def segments_made_outside(segments: Sequence[tuple[int, int]], like: Tensor) -> None:
    """The same for `token_segments`."""
    _make_segments(tuple(segments), like.device)


def _make_segments(segments: tuple[tuple[int, int], ...], device: torch.device) -> bool:
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
def _frame_pairs(flat: tuple[int, ...], frames: int, device: torch.device) -> FramePairTable:
    refuse_capture(device)
    with _no_modes():
        pairs = torch.tensor(flat, dtype=torch.int32, device="cpu").reshape(-1, 2)
        tables = [pairs]
        for column in (0, 1):
            of_frame = pairs[:, column].long()
            counts = torch.bincount(of_frame, minlength=frames)
            tables += [torch.cat((counts.new_zeros(1), counts.cumsum(0))), of_frame.argsort(stable=True)]
        return FramePairTable(*(table.to(device=device, dtype=torch.int32).contiguous() for table in tables))


@functools.cache
def token_segments(segments: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 `[G, 2]` (first token, tokens) of stretches of the token axis; kept as long as the process, like pairs."""
    refuse_capture(device)
    with _no_modes():
        return torch.tensor(segments, dtype=torch.int32, device="cpu").to(device)


def _no_modes() -> contextlib.AbstractContextManager[None]:
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
    row = torch.arange(height, device=device).repeat_interleave(width, output_size=height * width)
    column = torch.arange(width, device=device).repeat(height)
    once = torch.stack((torch.ones_like(row), column, row), dim=-1)
    table = torch.zeros(height * width, LANES, dtype=dtype, device=device)
    table[:, :6] = once.repeat(1, 2)
    return table


def window_centers(problem: PairProblem) -> Tensor | None:
    """int32 `[B, P, S, 2]` tokens (x, y): centres rounded to the nearest token and moved into the frame."""
    if problem.center is None:
        return None
    x = problem.center[..., 0].round().clamp(0, problem.grid.width - 1)
    y = problem.center[..., 1].round().clamp(0, problem.grid.height - 1)
    places = torch.stack((x, y), dim=-1).unflatten(1, (len(problem.pairs), -1))
    return places.to(torch.int32).contiguous()


def window_radius(problem: PairProblem) -> int:
    """The radius as the kernels read it: -1 without a window."""
    return -1 if problem.window is None else min(problem.window, max(problem.grid.height, problem.grid.width))
