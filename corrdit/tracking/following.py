"""One video on its way through the transformer: from chunks of frames to the places of points in every frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit.geometry import bilinear_tokens, pixels_to_tokens, sample_map, sample_matches, tokens_to_pixels
from corrdit.tracking.chunks import Chunk, last_visits
from corrdit.tracking.crops import CropLevel
from corrdit.tracking.encoding import FrameStore, resized
from corrdit.tracking.options import TrackerOptions
from corrdit.tracking.peaks import Located, locate, refined_peaks
from corrdit.tracking.queries import Frames
from corrdit.tracking.readings import ReadBackbone, Reading, cost_rows, matches_back, read_tokens
from corrdit.tracking.released_costs import tied_best

POSTERIOR_SEED = 2**40
"""Seeds of the codec's noise are far from those of the noise that latents are given."""
Found = tuple[Tensor, Tensor, Tensor]
Blocks = list[list[Chunk]]


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


class Following:
    """Follows points through one video.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        settings: what is asked for.
        video: gives uint8 `[t, H, W, 3]` by slices.
        report: called after each forward pass.
    """

    def __init__(self, backbone: ReadBackbone, settings: Settings, video: Frames, report: Callable[[], None]) -> None:
        self.backbone, self.settings, self.report = backbone, settings, report
        self.options, self.reading = settings.options, settings.reading
        self.stride = backbone.token_stride
        height, width = settings.encoded
        self.grid_size = (height // self.stride[0], width // self.stride[1])
        self.to_encoded = torch.tensor([width / video.shape[2], height / video.shape[1]])
        self.latents = FrameStore(video, self._encoded, settings.frames_kept)
        self.levels = [
            CropLevel(
                backbone,
                self.reading,
                video,
                (round(height / scale), round(width / scale)),
                tokens=self.options.crop_tokens,
                refine=self.options.refine,
                spread=self.options.path_spread,
                way_back=self._way_back,
                antialias=self.options.antialias,
                frames_kept=settings.frames_kept,
            )
            for scale in self.options.crops
        ]

    @property
    def _way_back(self) -> bool:
        return self.options.visibility == "consistency"

    def passes(self, points: int, blocks: Blocks) -> int:
        """Forward passes that `points` points need."""
        chunks = [chunk for block in blocks for chunk in block]
        batches = sum(1 + sum(level.batches(points, chunk) for level in self.levels) for chunk in chunks)
        return self.reading.passes * batches

    def follow(self, points: Tensor, blocks: Blocks) -> dict[int, Found]:
        """For every target frame xy `[P, 2]` in pixels, visible `[P]` and score `[P]` of points `[P, 2]`."""
        if self.options.schedule == "chained":
            return self._follow_chained(points, blocks[0])
        if self.options.geometry == "released":
            return self._follow_released(points, [chunk for chunks in blocks for chunk in chunks])
        found: dict[int, Found] = {}
        coarse = {blocks[0][0].source: self._tokens(points)}
        for chunks in blocks:
            everything = sorted({frame for chunk in chunks for frame in chunk.frames})
            self.latents.load(everything)
            located = self._follow_block(points, chunks, coarse)
            for level in self.levels:
                level.pictures.load(everything)
            found.update(self._look_closer(points, chunks, located))
        return found

    def _follow_released(self, points: Tensor, chunks: list[Chunk]) -> dict[int, Found]:
        """As DiffTrack's released code reads positions from the matches of all tokens."""
        accumulator = CostAccumulator(last_visits(chunks), average=self.options.average_overlap)
        return {
            frame: self._read_matches(points, cost)
            for index, chunk in enumerate(chunks)
            for frame, cost in accumulator.add(index, chunk, self._chunk_cost(chunk, points))
        }

    def _follow_block(self, points: Tensor, chunks: list[Chunk], coarse: dict[int, Tensor]) -> dict[int, Located]:
        """Positions in pixels in the frames of a block.

        `coarse` holds the positions in tokens of the anchor and of the frames followed so far and is added to.
        """
        accumulator = CostAccumulator(last_visits(chunks), average=self.options.average_overlap)
        located: dict[int, Located] = {}
        maps: dict[int, FrameCost] = {}
        for index, chunk in enumerate(chunks):
            cost = self._chunk_cost(chunk, points)
            for frame, frame_cost in accumulator.add(index, chunk, cost):
                point_cost = self._point_costs(points, cost.tokens, frame_cost)
                if self.options.path_spread == 0:
                    located[frame] = self._locate(self._tokens(points), point_cost, None)
                else:
                    # Half precision holds three digits of a cost, and these are kept until all frames are there.
                    maps[frame] = point_cost._replace(rows=point_cost.rows.half())
        if maps:
            located = self._follow_paths(points, chunks[0].source, maps, coarse)
        return {frame: result._replace(xy=self._pixels(result.xy)) for frame, result in located.items()}

    def _follow_paths(
        self, points: Tensor, anchor: int, maps: dict[int, FrameCost], coarse: dict[int, Tensor]
    ) -> dict[int, Located]:
        """From the anchor outwards in time, each frame's match near the path so far preferred; in tokens."""
        located: dict[int, Located] = {}
        place = self._tokens(points)
        after = sorted(frame for frame in maps if frame > anchor)
        before = sorted((frame for frame in maps if frame < anchor), reverse=True)
        for frame in (*after, *before):
            located[frame] = self._locate(place, maps[frame], coarse[frame - 1 if frame > anchor else frame + 1])
            coarse[frame] = located[frame].xy
        return located

    def _look_closer(self, points: Tensor, chunks: list[Chunk], located: dict[int, Located]) -> dict[int, Found]:
        """The positions at the finest level, and whether the match back agreed at all of them."""
        seen = {frame: _consistent(place, self.options.tolerance) for frame, place in located.items()}
        for level in self.levels:
            near = {frame: place.xy for frame, place in located.items()}
            located = {}
            for chunk in chunks:
                located.update(level.look(points, near, chunk, self.report))
            tolerance = self.options.crop_tolerance
            seen = {frame: seen[frame] & _consistent(place, tolerance) for frame, place in located.items()}
        return {frame: (place.xy, seen[frame], place.score) for frame, place in located.items()}

    def _follow_chained(self, points: Tensor, chunks: list[Chunk]) -> dict[int, Found]:
        """Each chunk starts from the positions found in the last frame of the one before."""
        found: dict[int, Found] = {}
        for chunk in chunks:
            start, seen = (found[chunk.source][:2]) if chunk.source in found else (points, None)
            cost = self._chunk_cost(chunk, start)
            accumulator = CostAccumulator(last_visits([chunk]), average=False)
            located = {}
            for frame, frame_cost in accumulator.add(0, chunk, cost):
                result = self._locate(self._tokens(start), self._point_costs(start, cost.tokens, frame_cost), None)
                located[frame] = result._replace(xy=self._pixels(result.xy))
            for frame, (xy, visible, score) in self._look_closer(start, [chunk], located).items():
                found[frame] = (xy, visible if seen is None else visible & seen, score)
        return found

    def _encoded(self, part: Tensor, numbers: list[int]) -> Tensor:
        """Latents `[t, C, lh, lw]`, every frame a latent of its own."""
        options, (height, width) = self.options, self.settings.encoded
        further: dict[str, Any] = {}
        if options.posterior == "sample":
            further["posterior_seeds"] = [POSTERIOR_SEED + 1_000_003 * self.reading.seed + frame for frame in numbers]
        if not options.antialias:
            further |= {"first": options.resize_first, "antialias": False}
        elif options.resize_first is not None:
            part = resized(part, *options.resize_first)
        return self.backbone.encode_frames(part, height=height, width=width, **further)

    def _noise(self, frames: tuple[int, ...], latents: Tensor) -> Tensor | None:
        """Noise of the reading: every frame's own, whatever chunk it is in."""
        if not self.reading.noise:
            return None
        drawn = []
        for frame in frames:
            generator = torch.Generator().manual_seed(self.reading.seed * 1_000_003 + frame)
            drawn.append(torch.randn(latents.shape[1:], generator=generator))
        return torch.stack(drawn).to(latents)

    def _chunk_cost(self, chunk: Chunk, points: Tensor) -> ChunkCost:
        """One forward pass: cost rows of the source tokens that the points need, and the way back."""
        tokens = torch.arange(self.grid_size[0] * self.grid_size[1])
        if self.options.geometry == "centers":
            around, _ = bilinear_tokens(self._tokens(points), self.grid_size)
            tokens = around.unique()
        latents = self.latents.of(chunk.frames)
        pair = read_tokens(self.backbone, latents, self.reading, self.grid_size, self._noise(chunk.frames, latents))
        for _ in range(self.reading.passes):
            self.report()
        source = chunk.frames.index(chunk.source)
        rows = cost_rows(pair, self.reading, tokens, source=source)[0]
        back = matches_back(pair, self.reading, source=source)[0] if self._way_back else None
        return ChunkCost(tokens, rows, back)

    def _read_matches(self, points: Tensor, cost: FrameCost) -> Found:
        """Positions in one target frame as DiffTrack's released code reads them from the matches of all tokens."""
        position = points * self.to_encoded
        rows, tied = cost.rows.mean(0), None
        if self.reading.rounding != "none":
            tied = tied_best(rows.flatten(1), len(self.reading.layers) * len(self.reading.timesteps))
        best, height = refined_peaks(rows, 0, best=tied)
        xy = sample_matches(best.unflatten(0, self.grid_size), position, self.stride, geometry="released")
        reading = pixels_to_tokens(position, self.stride, geometry="released", grid_size=self.grid_size)
        score = sample_map(height.unflatten(0, self.grid_size)[..., None], reading)[..., 0]
        return xy / self.to_encoded, torch.ones(len(xy), dtype=torch.bool), score

    def _point_costs(self, points: Tensor, tokens: Tensor, cost: FrameCost) -> FrameCost:
        """Cost maps `[V, P, h, w]` of points between token centres, from the rows of the four tokens round each."""
        around, share = bilinear_tokens(self._tokens(points), self.grid_size)
        rows = cost.rows[:, torch.searchsorted(tokens, around)]
        return cost._replace(rows=(rows * share[..., None, None].to(rows.dtype)).sum(2))

    def _locate(self, place: Tensor, cost: FrameCost, expected: Tensor | None) -> Located:
        """Positions in one target frame, in tokens; `place` and `expected` `[P, 2]` in tokens."""
        spread, refine = self.options.path_spread, self.options.refine
        return locate(cost.rows, place, refine=refine, expected=expected, spread=spread, back=cost.back)

    def _tokens(self, points: Tensor) -> Tensor:
        return pixels_to_tokens(points * self.to_encoded, self.stride)

    def _pixels(self, tokens: Tensor) -> Tensor:
        return tokens_to_pixels(tokens, self.stride) / self.to_encoded


def _consistent(located: Located, tolerance: float) -> Tensor:
    """bool `[P]`, whether the match of the match is near the point."""
    if located.miss is None:
        return torch.ones(len(located.xy), dtype=torch.bool)
    return located.miss <= tolerance
