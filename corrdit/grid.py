"""How a flat token axis maps to frames, rows and columns, and which frame pairs an operation visits."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from corrdit.arguments import flag, whole_number
from corrdit.pipelines import backbone_of_pipeline

if TYPE_CHECKING:
    import torch

FramePairs = list[tuple[int, int]]


def lists_pairs(frames: int | Iterable[tuple[int, int]] | None) -> TypeGuard[Iterable[tuple[int, int]]]:
    """Whether frames are given as pairs, not as None or a span (an array or tensor without axes among them)."""
    return isinstance(frames, Iterable) and getattr(frames, "ndim", 1) > 0


@runtime_checkable
class _SizedModel(Protocol):
    """A model that knows its grid; backbones do."""

    def generation_grid(self, height: int, width: int, num_frames: int) -> TokenGrid: ...


@dataclass(frozen=True)
class TokenGrid:
    """The token axis of one joint attention: video tokens row-major in (frame, row, column), text at one end.

    Args:
        frames: latent frames F.
        height: token rows h of a frame.
        width: token columns w of a frame.
        text_tokens: text tokens T in the same axis; 0 where text enters by cross-attention.
        text_first: whether the text tokens stand before the video tokens (CogVideoX) or after (HunyuanVideo, Mochi).

    Raises:
        ValueError: a size is not a whole number or is out of range.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0
    text_first: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (("frames", 1), ("height", 1), ("width", 1), ("text_tokens", 0)):
            object.__setattr__(self, name, whole_number(f"TokenGrid {name}", getattr(self, name), minimum))
        object.__setattr__(self, "text_first", flag("TokenGrid text_first", self.text_first))

    @classmethod
    def of(cls, pipe: object, *, height: int, width: int, num_frames: int) -> TokenGrid:
        """The grid of the self-attention of a pipeline while it generates a video of this size.

        Args:
            pipe: a diffusers video pipeline of a supported family, or a backbone of `corrdit.load_backbone`.
            height, width: of the video in pixels.
            num_frames: of the video.

        Raises:
            ValueError: no such pipeline, or a size that is not a whole number of tokens.
        """
        backbone = backbone_of_pipeline(pipe)
        if not isinstance(backbone, _SizedModel):
            raise ValueError(f"TokenGrid.of needs a diffusers video pipeline or a backbone, got {type(pipe).__name__}")
        return backbone.generation_grid(height, width, num_frames)

    @property
    def tokens_per_frame(self) -> int:
        """S = height * width."""
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        """F * S."""
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """N = text_tokens + F * S."""
        return self.text_tokens + self.video_tokens

    @property
    def video_start(self) -> int:
        return self.text_tokens if self.text_first else 0

    @property
    def video_slice(self) -> slice:
        """The video tokens in the flat axis."""
        return slice(self.video_start, self.video_start + self.video_tokens)

    @property
    def text_slice(self) -> slice:
        """The text tokens in the flat axis; empty without text."""
        start = 0 if self.text_first else self.video_tokens
        return slice(start, start + self.text_tokens)

    def frame_slice(self, frame: int) -> slice:
        """The tokens of one frame in the flat axis."""
        if not 0 <= frame < self.frames:
            raise ValueError(f"frame {frame} is outside the grid, which has frames 0 to {self.frames - 1}")
        start = self.video_start + frame * self.tokens_per_frame
        return slice(start, start + self.tokens_per_frame)

    def token(self, frame: int, row: int, column: int) -> int:
        """The flat index of a video token."""
        if not (0 <= row < self.height and 0 <= column < self.width):
            raise ValueError(
                f"token (row {row}, column {column}) is outside the grid of {self.height} rows and {self.width} columns"
            )
        return self.frame_slice(frame).start + row * self.width + column

    def without_text(self) -> TokenGrid:
        """The same grid for the video tokens alone."""
        return replace(self, text_tokens=0)

    def coordinates(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`[S, 2]` position (x = column, y = row) of each token of a frame, in tokens."""
        import torch

        dtype = dtype or torch.float32
        row, column = torch.meshgrid(
            torch.arange(self.height, device=device, dtype=dtype),
            torch.arange(self.width, device=device, dtype=dtype),
            indexing="ij",
        )
        return torch.stack((column, row), dim=-1).reshape(self.tokens_per_frame, 2)

    def frame_pairs(self, frames: int | Iterable[tuple[int, int]] | None = None) -> FramePairs:
        """The (query frame, key frame) pairs an operation visits.

        Args:
            frames: None for all F * F pairs, an int for the pairs with `|i - j| <= frames`, or the pairs themselves.

        Returns:
            The pairs, in lexicographic order for None and an int, in the given order otherwise.

        Raises:
            ValueError: a negative span, an empty list, or a pair outside the grid.
        """
        if frames is None:
            return [(i, j) for i in range(self.frames) for j in range(self.frames)]
        if not lists_pairs(frames):
            span = whole_number("frames given as a span", frames, 0)
            return [(i, j) for i, j in self.frame_pairs() if abs(i - j) <= span]
        pairs = []
        for entry in frames:
            try:
                i, j = (operator.index(index) for index in entry)
            except (TypeError, ValueError):
                raise ValueError(
                    "frames must be None, an int (span) or a list of (query frame, key frame) pairs, "
                    f"got {entry!r} in it"
                ) from None
            if not (0 <= i < self.frames and 0 <= j < self.frames):
                raise ValueError(f"frame pair ({i}, {j}) is outside the grid, which has frames 0 to {self.frames - 1}")
            pairs.append((i, j))
        if not pairs:
            raise ValueError("frames is an empty list; give a (query frame, key frame) pair, or None for all")
        return pairs


@dataclass(frozen=True)
class CrossGrid:
    """The two token axes of attention from a video to a text.

    Args:
        frames, height, width: of the query tokens, frame by frame, row by row.
        keys: text tokens.
    """

    frames: int
    height: int
    width: int
    keys: int

    @property
    def video_tokens(self) -> int:
        """Query tokens."""
        return self.frames * self.height * self.width
