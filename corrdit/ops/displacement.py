"""Displacement of every token of one frame to another frame: soft (expected) and hard (best)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from corrdit.arguments import whole_number
from corrdit.grid import FramePairs, TokenGrid, lists_pairs
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend
from corrdit.problem import PairProblem


class PairAxes(NamedTuple):
    """How the rows of a problem, those of every pair one after the other, are laid out for a user.

    Attributes:
        shape: (pairs..., row, column) of whole frames; None for a range of queries, whose rows are (query, key frame).
        frames: (queries, key frames) of each query frame, for a range.
    """

    shape: tuple[int, ...] | None
    frames: list[tuple[int, int]]

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.shape is not None:
            return self.shape
        return sum(tokens for tokens, _ in self.frames), self.frames[0][1]

    def laid_out(self, rows: Tensor, axis: int) -> Tensor:
        """`[..., R, ...]` with the axes of `lengths` in place of R."""
        if self.shape is not None:
            return rows.unflatten(axis, self.shape)
        parts = rows.split([tokens * pairs for tokens, pairs in self.frames], axis)
        by_query = [
            part.unflatten(axis, (pairs, tokens)).transpose(axis, axis + 1)
            for part, (tokens, pairs) in zip(parts, self.frames, strict=True)
        ]
        return torch.cat(by_query, axis)

    def rows(self, field: Tensor) -> Tensor:
        """`[B, R, 2]` from `[B, *lengths, 2]`."""
        if self.shape is not None:
            return field.reshape(field.shape[0], -1, field.shape[-1])
        parts = field.split([tokens for tokens, _ in self.frames], 1)
        return torch.cat([part.transpose(1, 2).flatten(1, 2) for part in parts], 1)


@overload
def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor: ...


@overload
def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Expected displacement of every token under its attention on each frame: the attention motion flow.

    For query token p of frame i and every frame j, `sum_p' P[p, p'] (p' - p)` with P the softmax over the tokens p' of
    frame j of `temperature * scale * q.k`. Source: DiTFlow, "Video Motion Transfer with Diffusion Transformers"
    (arXiv 2412.07776), attention motion flow.

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16, float32 or float64. Text tokens take no part.
        grid: how the N tokens are arranged.
        heads: what is averaged over heads before the expectation: "logits", "features" (q and k), "probabilities", or
            "none" to keep the heads apart.
        head_weights: `[H]` non-negative weights of the heads in that average, normalised to sum 1.
        temperature: multiplies the logits; above 0.
        frames: None for all pairs, an int for `|i - j| <= frames`, or a list of (query frame, key frame).
        window: radius in tokens, in both axes, of the keys a query sees; clipped at the border.
        center: `[B, F, F, h, w, 2]` (or `[B, P, h, w, 2]` with `frames`; in general the shape of the result without
            heads) place (x, y) in tokens of the key frame round which the window lies, rounded to a token and moved
            into the frame; the query's own place by default.
        scale: factor of q.k, `D ** -0.5` by default.
        key_mask: bool `[B, N]`, True = may be attended. A query without any key gets displacement 0.
        queries, query_frames, keys: what q and k hold if not the whole axis, and fewer key heads; see `corrdit.ops`.
        return_lse: whether to return the logarithm of what each softmax divides by too; -inf for a query without keys.
            Not with heads="probabilities", which has no single softmax.
        backend: "auto", "triton", "streaming" or "reference". "auto" is "triton" for CUDA tensors and "streaming" for
            all others; also, with a warning in the log that says why, for CUDA tensors the kernels do not take
            (float64, head_dim outside 8 to 256, AMD devices, compute capability below 8.0).
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        (dx, dy) in tokens, x to the right and y down, float32 (float64 for float64 input):
        `[B, F, F, h, w, 2]` (query frame, key frame, row, column), or `[B, P, h, w, 2]` with `frames`; with
        heads="none" a head axis after the batch. A range of `queries` gives `[B, n, F, 2]` (query, key frame), or, with
        `frames`, `[B, n, P, 2]` (query, the pairs of its frame in their order); `query_frames` give
        `[B, Fq, F, h, w, 2]`. With `return_lse` a pair of it and the log-sum-exp, in the same shape without its last
        axis. Differentiable in q and k, once.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    problem, axes = displacement_problem(
        q, k, grid, heads=heads, head_weights=head_weights, temperature=temperature, frames=frames, window=window,
        center=center, scale=scale, key_mask=key_mask, queries=queries, query_frames=query_frames, keys=keys,
        memory_budget=memory_budget, return_lse=return_lse,
    )  # fmt: skip
    q, k, problem = problem.of_read_heads(q, k)
    with full_precision(q):
        rows, lse = select_backend(backend, q, problem).soft_displacement(q, k, problem)
    moved = by_heads(rows, problem, axes)
    return moved if lse is None else (moved, by_heads(lse, problem, axes))


@torch.no_grad()
def hard_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Displacement of every token to the key of largest weight in each frame.

    Takes the arguments of `soft_displacement`; the argmax stands in place of the expectation, ties go to the lowest
    flat index, and NaN behaves as in `torch.argmax`. Source: DiTFlow (arXiv 2412.07776), reference motion flow.

    Returns:
        int64 (dx, dy) in tokens, in the shape of `soft_displacement`. Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    problem, axes = displacement_problem(
        q, k, grid, heads=heads, head_weights=head_weights, temperature=temperature, frames=frames, window=window,
        center=center, scale=scale, key_mask=key_mask, queries=queries, query_frames=query_frames, keys=keys,
        memory_budget=memory_budget,
    )  # fmt: skip
    q, k, problem = problem.of_read_heads(q, k)
    with full_precision(q):
        rows = select_backend(backend, q, problem).hard_displacement(q, k, problem)
    return by_heads(rows, problem, axes)


def by_heads(rows: Tensor, problem: PairProblem, axes: PairAxes) -> Tensor:
    """A backend's `[B, H or 1, R, ...]` as the caller asked for it."""
    return axes.laid_out(rows, 2) if problem.heads == "none" else axes.laid_out(rows.squeeze(1), 1)


def displacement_problem(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str,
    head_weights: Tensor | Iterable[float] | None,
    temperature: float,
    frames: int | Iterable[tuple[int, int]] | None,
    window: int | None,
    center: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: bool = False,
    memory_budget: int | None,
) -> tuple[PairProblem, PairAxes]:
    """The checked arguments of `soft_displacement`, and how its rows are laid out."""
    problem = checks.checked_problem(
        q, k, None, grid, heads=heads, head_weights=head_weights, scale=scale, temperature=temperature,
        key_mask=key_mask, queries=queries, query_frames=query_frames, keys=keys, return_lse=return_lse,
        memory_budget=memory_budget,
    )  # fmt: skip
    problem = replace(problem, pairs=_held_pairs(problem, frames))
    axes = _pair_axes(problem, square=frames is None)
    radius = None if window is None else min(whole_number("window", window, 0), max(grid.height, grid.width))
    return replace(problem, window=radius, center=_check_center(center, radius, q, axes)), axes


def _held_pairs(problem: PairProblem, frames: int | Iterable[tuple[int, int]] | None) -> FramePairs:
    """The pairs whose queries q holds: as given for whole frames, else in the order of its frames."""
    pairs, held = problem.grid.frame_pairs(frames), problem.queries
    listed = lists_pairs(frames)
    for query_frame, _ in pairs if listed else []:
        if query_frame not in held.frames:
            raise ValueError(
                f"frames asks for queries of frame {query_frame}, but q holds those of frames {list(held.frames)}"
            )
    if held.selection == "all" or (listed and held.selection == "frames"):
        return pairs
    return [pair for frame in held.frames for pair in pairs if pair[0] == frame]


def _pair_axes(problem: PairProblem, *, square: bool) -> PairAxes:
    grid, held = problem.grid, problem.queries
    if held.selection != "range":
        pair_axes = (len(held.frames), grid.frames) if square else (len(problem.pairs),)
        return PairAxes((*pair_axes, grid.height, grid.width), [])
    counts = [sum(pair[0] == frame for pair in problem.pairs) for frame in held.frames]
    if min(counts) != max(counts):
        raise ValueError(
            f"a range of queries needs as many pairs for each of its frames, but frames {list(held.frames)} are in "
            f"{counts} of them; give a range within one frame, or query_frames"
        )
    return PairAxes(None, [(part.tokens, count) for part, count in zip(held.frames.values(), counts, strict=True)])


def _check_center(center: Tensor | None, window: int | None, q: Tensor, axes: PairAxes) -> Tensor | None:
    """`[B, R, 2]` floating point, whatever way the pairs were asked for."""
    if center is None:
        return None
    if window is None:
        raise ValueError("center places a window, but window is None; give the radius of the window in tokens")
    expected = [q.shape[0], *axes.lengths, 2]
    if not isinstance(center, Tensor) or list(center.shape) != expected or center.device != q.device:
        given = f"{list(center.shape)} on {center.device}" if isinstance(center, Tensor) else type(center).__name__
        raise ValueError(f"center must be a tensor {expected} on {q.device}, got {given}")
    center = center.detach()
    if center.is_complex():
        raise ValueError(f"center must be real, got {center.dtype}")
    if not center.is_floating_point():
        center = center.to(torch.float32)
    if checks.may_read(center) and not bool(torch.isfinite(center).all()):
        raise ValueError("center must be finite, got NaN or infinity in it")
    return axes.rows(center)
