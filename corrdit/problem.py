"""What an operation is asked about q and k: one object, checked and made in `corrdit.ops`, taken by every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.arguments import choice
from corrdit.grid import FramePairs, TokenGrid

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_MODES = ("logits", "features", "probabilities", "none")
FLOAT32_PRECISIONS = ("ieee", "tf32")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the type of scores, statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class HeldFrame(NamedTuple):
    """Tokens `first` to `stop` of a frame that a tensor holds; token t of the frame stands at `origin + t` in it."""

    first: int
    stop: int
    origin: int

    @property
    def tokens(self) -> int:
        return self.stop - self.first

    @property
    def place(self) -> slice:
        """Where they stand in the tensor's token axis."""
        return slice(self.origin + self.first, self.origin + self.stop)


@dataclass(frozen=True)
class TokenAxis:
    """Which tokens of a grid stand in the token axis of a tensor.

    Attributes:
        tokens: how many.
        frames: the frames some of whose tokens it holds, in the order in which they stand.
        text: where the text tokens stand; empty where it holds none.
        selection: "all", or what was chosen: a "range" of video tokens, or whole "frames".
    """

    tokens: int
    frames: dict[int, HeldFrame]
    text: slice
    selection: str

    @classmethod
    def of_grid(cls, grid: TokenGrid) -> TokenAxis:
        """Every token, as the model has them."""
        return cls._of(grid, ((frame, 0, grid.tokens_per_frame) for frame in range(grid.frames)), True, "all")

    @classmethod
    def of_range(cls, grid: TokenGrid, start: int, stop: int, *, text: bool) -> TokenAxis:
        """Video tokens `start` to `stop`, and the text at its end of them if it is there too."""
        size = grid.tokens_per_frame
        frames = range(start // size, -(-stop // size))
        stretches = ((frame, max(start - frame * size, 0), min(stop - frame * size, size)) for frame in frames)
        return cls._of(grid, stretches, text, "range")

    @classmethod
    def of_frames(cls, grid: TokenGrid, frames: Iterable[int], *, text: bool) -> TokenAxis:
        """Chosen frames, and the text at its end of them if it is there too."""
        return cls._of(grid, ((frame, 0, grid.tokens_per_frame) for frame in frames), text, "frames")

    @classmethod
    def _of(cls, grid: TokenGrid, stretches: Iterable[tuple[int, int, int]], text: bool, selection: str) -> TokenAxis:
        text_tokens = grid.text_tokens if text else 0
        place = text_tokens if grid.text_first else 0
        frames = {}
        for frame, first, stop in stretches:
            frames[frame] = HeldFrame(first, stop, place - first)
            place += stop - first
        text_start = 0 if grid.text_first else place
        total = place if grid.text_first else place + text_tokens
        return cls(total, frames, slice(text_start, text_start + text_tokens), selection)

    @property
    def video(self) -> slice:
        """Where the video tokens stand."""
        held = list(self.frames.values())
        return slice(held[0].place.start, held[-1].place.stop)

    def places(self, frames: int) -> list[int]:
        """(place of the frame's token 0, first token held, stop) of each of so many frames one after the other.

        Places are among the video tokens that the tensor holds; (0, 0, 0) stands for a frame of which it holds nothing.
        """
        start = self.video.start
        numbers: list[int] = []
        for frame in range(frames):
            held = self.frames.get(frame)
            numbers += (0, 0, 0) if held is None else (held.origin - start, held.first, held.stop)
        return numbers

    def between(self, first: int, last: int) -> slice:
        """Where the tokens of frames `first` to `last` stand that it holds, if they are neighbours; may be empty."""
        held = [self.frames[frame].place for frame in range(first, last + 1) if frame in self.frames]
        return slice(held[0].start, held[-1].stop) if held else slice(0, 0)


@dataclass(frozen=True)
class PairProblem:
    """The question of one operation. A key that k does not hold is as one that the mask removes.

    Attributes:
        grid: how the tokens of the whole axis are arranged.
        queries, keys: which of them q, and k (and v), hold.
        factor: what q.k is multiplied by before a softmax: scale, times the temperature where there is one.
        heads: what is averaged over heads, one of `HEAD_MODES`; "none" too where there is nothing to choose.
        weights: `[H]` of the query heads in that average, summing to 1, in the working precision; None for "none".
        read_heads: the query heads whose weight is not 0, in order, where some are known to have weight 0; else None.
        pairs: (query frame, key frame) the operation visits; empty where it is not about pairs.
        key_mask: bool `[B, tokens of k]`, True = may be attended.
        window, center: radius in tokens of the keys a query sees, and `[B, R, 2]` places (x, y) round which it lies
            instead of the query's own, for the R rows of `pair_rows`.
        with_lse: whether the log-sum-exp is asked for too.
        memory_budget: bytes beyond inputs and outputs (streaming).
        precision: of the kernels' products of float32, one of `FLOAT32_PRECISIONS`.
    """

    grid: TokenGrid
    queries: TokenAxis
    keys: TokenAxis
    factor: float
    heads: str = "none"
    weights: Tensor | None = None
    read_heads: list[int] | None = None
    pairs: FramePairs = field(default_factory=list)
    key_mask: Tensor | None = None
    window: int | None = None
    center: Tensor | None = None
    with_lse: bool = False
    memory_budget: int | None = None
    precision: str = "ieee"

    def of_read_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, PairProblem]:
        """q, k and the problem without the query heads of weight 0, which are neither read nor multiplied."""
        if self.read_heads is None or self.weights is None:
            return q, k, self
        group = q.shape[1] // k.shape[1]
        keys = k if group == q.shape[1] else _heads(k, [head // group for head in self.read_heads])
        weights = _heads(self.weights.unsqueeze(0), self.read_heads).squeeze(0)
        return _heads(q, self.read_heads), keys, replace(self, weights=weights, read_heads=None)

    def pair_rows(self) -> list[slice]:
        """Where the queries of each pair stand in an axis that holds those of every pair one after the other."""
        rows = []
        start = 0
        for query_frame, _ in self.pairs:
            stop = start + self.queries.frames[query_frame].tokens
            rows.append(slice(start, stop))
            start = stop
        return rows

    @property
    def limits(self) -> tuple[Tensor, ...]:
        """The caller's tensors that say which keys a query sees."""
        return tuple(tensor for tensor in (self.key_mask, self.center) if tensor is not None)

    @property
    def rows(self) -> int:
        """R, the length of that axis."""
        return sum(self.queries.frames[query_frame].tokens for query_frame, _ in self.pairs)

    def video_mask(self) -> Tensor | None:
        """bool `[B or 1, F * S]`, True = may be attended and is held; None where all of every held frame may be."""
        video, size = self.keys.video, self.grid.tokens_per_frame
        of_held = None if self.key_mask is None else self.key_mask[:, video]
        if of_held is None and all(held.tokens == size for held in self.keys.frames.values()):
            return None
        first_frame, first = next(iter(self.keys.frames.items()))
        start = first_frame * size + first.first
        mask = torch.zeros(1, self.grid.video_tokens, dtype=torch.bool, device="cpu")
        if of_held is not None:
            mask = of_held.new_zeros(len(of_held), self.grid.video_tokens)
        mask[:, start : start + video.stop - video.start] = True if of_held is None else of_held
        return mask


def _heads(tensor: Tensor, heads: list[int]) -> Tensor:
    """`[B, H, ...]` of some heads in rising order: a view where they are evenly spaced, else a copy."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and heads == list(range(heads[0], heads[-1] + 1, step)):
        return tensor[:, heads[0] : heads[-1] + 1 : step]
    return torch.stack([tensor[:, head] for head in heads], 1)


_scopes: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("float32 precision", default=())
# What torch.compile sees, which cannot read a ContextVar but compiles again when a plain value has changed.
_entered_last = "ieee"


@contextlib.contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within it, products of float32 in the kernels use "tf32" (tensor cores, ten-bit mantissa) in place of "ieee".

    It holds for this thread or task, and where scopes overlap the one entered last counts. A caller compiled by
    `torch.compile` takes the scope that was entered or left last in the process.

    Raises:
        ValueError: neither "ieee" nor "tf32".
    """
    global _entered_last  # noqa: PLW0603
    choice("float32 precision", precision, FLOAT32_PRECISIONS)
    before = _entered_last
    # A traced caller can neither make an object nor set a ContextVar.
    scope = None if torch.compiler.is_compiling() else (object(), precision)
    if scope is not None:
        _scopes.set((*_scopes.get(), scope))
    _entered_last = precision
    try:
        yield
    finally:
        if scope is None:
            _entered_last = before
        else:
            _scopes.set(tuple(other for other in _scopes.get() if other is not scope))
            _entered_last = product_precision()


def product_precision() -> str:
    """The precision of float32 products in force; 16-bit products do not look at it."""
    if torch.compiler.is_compiling():
        return _entered_last
    scopes = _scopes.get()
    return scopes[-1][1] if scopes else "ieee"
