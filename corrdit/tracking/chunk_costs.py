"""What the forward passes say: cost maps of the tokens of one frame in the frames of a chunk, read once or kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit.tracking.chunks import Chunk
from corrdit.tracking.encoding import FrameStore, resized
from corrdit.tracking.options import POSTERIOR_SEED, TrackerOptions
from corrdit.tracking.queries import Frames
from corrdit.tracking.readings import ReadBackbone, Reading, TokenPair, cost_rows, matches_back, read_tokens


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


@dataclass(frozen=True)
class Settings:
    """What the tracker and the backbone's preset together ask for.

    Args:
        options: of the tracker.
        reading: what is read of the transformer.
        encoded: (height, width) in pixels at which whole frames are encoded.
        frames_kept: frames of which something is held in memory.
    """

    options: TrackerOptions
    reading: Reading
    encoded: tuple[int, int]
    frames_kept: int


class HeldChunk(NamedTuple):
    """Queries and keys of a chunk, and what `ChunkCost.back` says of it once somebody has asked."""

    pair: TokenPair
    back: Tensor | None


class ChunkReader:
    """The transformer's side of following: latents of frames, and what it says of chunks of them.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        settings: what is asked for.
        video: gives uint8 `[t, H, W, 3]` by slices.
        report: called after each forward pass.
        keep: whether the queries and keys of every chunk are kept, so that it goes through the transformer once.
    """

    def __init__(
        self, backbone: ReadBackbone, settings: Settings, video: Frames, report: Callable[[], None], *, keep: bool
    ) -> None:
        self.backbone, self.settings, self.report, self.keep = backbone, settings, report, keep
        self.stride = backbone.token_stride
        height, width = settings.encoded
        self.grid_size = (height // self.stride[0], width // self.stride[1])
        self.latents = FrameStore(video, self._encoded, settings.frames_kept)
        self.held: dict[Chunk, HeldChunk] = {}

    def passes(self, chunks: Iterable[Chunk]) -> int:
        """Forward passes that these chunks still need."""
        return self.settings.reading.passes * sum(chunk not in self.held for chunk in chunks)

    def read(self, chunk: Chunk) -> HeldChunk:
        """What is held of a chunk, or one forward pass."""
        if (held := self.held.get(chunk)) is not None:
            return held
        reading, latents = self.settings.reading, self.latents.of(chunk.frames)
        pair = read_tokens(self.backbone, latents, reading, self.grid_size, self._noise(chunk.frames, latents))
        for _ in range(reading.passes):
            self.report()
        held = HeldChunk(pair, None)
        if self.keep:
            self.held[chunk] = held
        return held

    def cost(self, chunk: Chunk, tokens: Tensor, *, way_back: bool) -> ChunkCost:
        """Cost rows of tokens `[R]` of the source frame, ascending, and if asked for the way back."""
        held, reading, source = self.read(chunk), self.settings.reading, chunk.frames.index(chunk.source)
        rows = cost_rows(held.pair, reading, tokens, source=source)[0]
        return ChunkCost(tokens, rows, self._back(chunk, held) if way_back else None)

    def back(self, chunk: Chunk) -> Tensor:
        """float `[F, h, w, 2]` for each token of every frame of a chunk its best token (x, y) in the source frame."""
        return self._back(chunk, self.read(chunk))

    def _back(self, chunk: Chunk, held: HeldChunk) -> Tensor:
        if held.back is not None:
            return held.back
        back = matches_back(held.pair, self.settings.reading, source=chunk.frames.index(chunk.source))[0]
        if self.keep:
            self.held[chunk] = held._replace(back=back)
        return back

    def _encoded(self, part: Tensor, numbers: list[int]) -> Tensor:
        """Latents `[t, C, lh, lw]` of frames by their numbers, every frame a latent of its own."""
        options, (height, width) = self.settings.options, self.settings.encoded
        further: dict[str, Any] = {}
        if options.posterior == "sample":
            first = POSTERIOR_SEED + 1_000_003 * self.settings.reading.seed
            further["posterior_seeds"] = [first + frame for frame in numbers]
        if not options.antialias:
            further |= {"first": options.resize_first, "antialias": False}
        elif options.resize_first is not None:
            part = resized(part, *options.resize_first)
        return self.backbone.encode_frames(part, height=height, width=width, **further)

    def _noise(self, frames: tuple[int, ...], latents: Tensor) -> Tensor | None:
        """Noise of the reading: every frame's own, whatever chunk it is in."""
        if not self.settings.reading.noise:
            return None
        drawn = []
        for frame in frames:
            generator = torch.Generator().manual_seed(self.settings.reading.seed * 1_000_003 + frame)
            drawn.append(torch.randn(latents.shape[1:], generator=generator))
        return torch.stack(drawn).to(latents)
