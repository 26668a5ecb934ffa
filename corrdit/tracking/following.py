"""One video on its way through the transformer: from chunks of frames to the places of points in every frame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.geometry import bilinear_tokens, pixels_to_tokens, sample_map, sample_matches, tokens_to_pixels
from corrdit.tracking.chunk_costs import ChunkCost, ChunkReader, CostAccumulator, FrameCost
from corrdit.tracking.chunks import Chunk, last_visits
from corrdit.tracking.crops import CropLevel
from corrdit.tracking.peaks import Located, locate, refined_peaks
from corrdit.tracking.queries import Frames
from corrdit.tracking.released_costs import tied_best
from corrdit.tracking.updating import FeatureAverage, feature_costs, features_at

Found = tuple[Tensor, Tensor, Tensor]
Blocks = list[list[Chunk]]


class End(NamedTuple):
    """Where a block left off, in one frame: `tokens [P, 2]` before any crop, xy `[P, 2]` in pixels, visible `[P]`."""

    tokens: Tensor
    xy: Tensor
    visible: Tensor


Ends = dict[int, End]
"""By frame."""


class BlockTracks(NamedTuple):
    """Tracks of P points through the n target frames of a block.

    Attributes:
        frames: ascending.
        xy: float32 `[n, P, 2]` in pixels of the video.
        visible: bool `[n, P]`.
        score: float32 `[n, P]`.
        last: of the frames, the one farthest from the anchor.
        tokens: float32 `[P, 2]`, places in it as a block that goes on from there needs them.
    """

    frames: tuple[int, ...]
    xy: Tensor
    visible: Tensor
    score: Tensor
    last: int
    tokens: Tensor

    @property
    def end(self) -> Ends:
        """What the next block needs."""
        place = self.frames.index(self.last)
        return {self.last: End(self.tokens, self.xy[place], self.visible[place])}


class Following:
    """Follows points through one video.

    Args:
        reader: of its chunks.
        video: gives uint8 `[t, H, W, 3]` by slices.
    """

    def __init__(self, reader: ChunkReader, video: Frames) -> None:
        self.reader, self.options = reader, reader.settings.options
        self.stride, self.grid_size, self.latents = reader.stride, reader.grid_size, reader.latents
        height, width = reader.settings.encoded
        self.to_encoded = torch.tensor([width / video.shape[2], height / video.shape[1]])
        self.levels = [
            CropLevel(
                reader.backbone,
                reader.settings.reading,
                video,
                (round(height / scale), round(width / scale)),
                tokens=self.options.crop_tokens,
                refine=self.options.refine,
                spread=self.options.path_spread,
                way_back=self.way_back,
                antialias=self.options.antialias,
                frames_kept=reader.settings.frames_kept,
            )
            for scale in self.options.crops
        ]

    @property
    def way_back(self) -> bool:
        """Whether the match of each match is asked for."""
        return self.options.visibility == "consistency"

    def passes(self, points: int, blocks: Blocks) -> int:
        """Forward passes that `points` points need."""
        chunks = [chunk for block in blocks for chunk in block]
        crops = sum(level.batches(points, chunk) for level in self.levels for chunk in chunks)
        return self.reader.passes(chunks) + self.reader.settings.reading.passes * crops

    def bytes_a_point(self, blocks: Blocks) -> int:
        """About what the cost maps of one more point take."""
        frames = max(len({frame for chunk in block for frame in chunk.targets}) for block in blocks)
        kept = 2 * frames if self.options.path_spread else 0
        chunk = 16 * max(len(chunk.frames) for block in blocks for chunk in block)
        return (kept + chunk) * self.grid_size[0] * self.grid_size[1]

    def start(self, points: Tensor, anchor: int) -> Ends:
        """What is known before any block: points `[P, 2]` in pixels of the video, in the anchor's frame."""
        return {anchor: End(self.tokens_of(points), points, torch.ones(len(points), dtype=torch.bool))}

    def follow(self, points: Tensor, chunks: list[Chunk], ends: Ends) -> BlockTracks:
        """Places of points `[P, 2]` of the anchor's frame, in pixels, in the target frames of a block.

        Args:
            points: `[P, 2]` in pixels of the video.
            chunks: of one block.
            ends: of the blocks before; those of the anchor and of the frame next to the block are looked at.
        """
        coarse: dict[int, Tensor] = {}
        if self.options.schedule == "chained":
            found = self._follow_chained(chunks[0], ends)
        elif self.options.geometry == "released":
            found = self._follow_released(points, chunks)
        else:
            coarse = {frame: end.tokens for frame, end in ends.items()}
            self.load(chunks)
            found = self._look_closer(points, chunks, self._follow_block(points, chunks, coarse))
        frames = tuple(sorted(found))
        xy, visible, score = (torch.stack([found[frame][part] for frame in frames]) for part in range(3))
        farthest = frames[-1] if frames[-1] > chunks[0].source else frames[0]
        tokens = coarse[farthest] if farthest in coarse else self.tokens_of(xy[frames.index(farthest)])
        return BlockTracks(frames, xy, visible, score, farthest, tokens)

    def load(self, chunks: list[Chunk]) -> None:
        """Make what is needed of the frames of these chunks, in the order of the video."""
        everything = sorted({frame for chunk in chunks for frame in chunk.frames})
        self.latents.load(everything)
        for level in self.levels:
            level.pictures.load(everything)

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
        if self.options.update:
            return self._follow_updated(points, chunks, coarse)
        accumulator = CostAccumulator(last_visits(chunks), average=self.options.average_overlap)
        located: dict[int, Located] = {}
        maps: dict[int, FrameCost] = {}
        for index, chunk in enumerate(chunks):
            cost = self._chunk_cost(chunk, points)
            for frame, frame_cost in accumulator.add(index, chunk, cost):
                point_cost = self._point_costs(points, cost.tokens, frame_cost)
                if self.options.path_spread == 0:
                    located[frame] = self._locate(self.tokens_of(points), point_cost, None)
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
        place = self.tokens_of(points)
        for frame in _outwards(maps, anchor):
            located[frame] = self._locate(place, maps[frame], coarse[_before(frame, anchor)])
            coarse[frame] = located[frame].xy
        return located

    def _follow_updated(self, points: Tensor, chunks: list[Chunk], coarse: dict[int, Tensor]) -> dict[int, Located]:
        """As `_follow_block`, with features of the points that are updated where the match leads back.

        The features of a point are those of the four tokens round it, and are updated at the same distances from the
        place that is found. A frame that several chunks hold is looked for in the first of them.
        """
        anchor, place, reading = chunks[0].source, self.tokens_of(points), self.reader.settings.reading
        chunk_of = {frame: chunk for chunk in reversed(chunks) for frame in chunk.targets}
        pairs = {chunk: self.reader.read(chunk).pair for chunk in chunks}
        around, share = bilinear_tokens(place, self.grid_size)
        corners = torch.stack((around % self.grid_size[1], around // self.grid_size[1]), -1).to(place)
        located: dict[int, Located] = {}
        for side in (1, -1):
            seen = FeatureAverage(self.options.update)
            for frame in _outwards(chunk_of, anchor):
                if (frame - anchor) * side < 0:
                    continue
                chunk = chunk_of[frame]
                pair, target, source = pairs[chunk], chunk.frames.index(frame), chunk.frames.index(anchor)
                features = seen.of(features_at(pair, corners.flatten(0, 1), source))
                rows = feature_costs(pair, reading, features, source=source, target=target)
                rows = (rows.unflatten(0, (-1, 4)) * share[..., None, None]).sum(1)
                back = self.reader.back(chunk)[target]
                found = self._locate(place, FrameCost(rows[None], back), coarse.get(_before(frame, anchor)))
                there = found.xy.unsqueeze(1) + (corners - place.unsqueeze(1))
                trusted = _consistent(found, self.options.tolerance).repeat_interleave(4)
                seen.see(features_at(pair, there.flatten(0, 1), target), trusted)
                located[frame], coarse[frame] = found, found.xy
        return {frame: result._replace(xy=self._pixels(result.xy)) for frame, result in located.items()}

    def _look_closer(self, points: Tensor, chunks: list[Chunk], located: dict[int, Located]) -> dict[int, Found]:
        """The positions at the finest level, and whether the match back agreed at all of them."""
        seen = {frame: _consistent(place, self.options.tolerance) for frame, place in located.items()}
        for level in self.levels:
            near = {frame: place.xy for frame, place in located.items()}
            located = {}
            for chunk in chunks:
                located.update(level.look(points, near, chunk, self.reader.report))
            tolerance = self.options.crop_tolerance
            seen = {frame: seen[frame] & _consistent(place, tolerance) for frame, place in located.items()}
        return {frame: (place.xy, seen[frame], place.score) for frame, place in located.items()}

    def _follow_chained(self, chunk: Chunk, ends: Ends) -> dict[int, Found]:
        """A chunk starts from the positions found in the last frame of the one before."""
        _, start, seen = ends[chunk.source]
        cost = self._chunk_cost(chunk, start)
        accumulator = CostAccumulator(last_visits([chunk]), average=False)
        located = {}
        for frame, frame_cost in accumulator.add(0, chunk, cost):
            result = self._locate(self.tokens_of(start), self._point_costs(start, cost.tokens, frame_cost), None)
            located[frame] = result._replace(xy=self._pixels(result.xy))
        found = self._look_closer(start, [chunk], located)
        return {frame: (xy, visible & seen, score) for frame, (xy, visible, score) in found.items()}

    def _chunk_cost(self, chunk: Chunk, points: Tensor) -> ChunkCost:
        """Cost rows of the source tokens that the points need, and the way back."""
        tokens = torch.arange(self.grid_size[0] * self.grid_size[1])
        if self.options.geometry == "centers":
            around, _ = bilinear_tokens(self.tokens_of(points), self.grid_size)
            tokens = around.unique()
        return self.reader.cost(chunk, tokens, way_back=self.way_back)

    def _read_matches(self, points: Tensor, cost: FrameCost) -> Found:
        """Positions in one target frame as DiffTrack's released code reads them from the matches of all tokens."""
        position = points * self.to_encoded
        rows, tied = cost.rows.mean(0), None
        reading = self.reader.settings.reading
        if reading.rounding != "none":
            tied = tied_best(rows.flatten(1), len(reading.layers) * len(reading.timesteps))
        best, height = refined_peaks(rows, 0, best=tied)
        xy = sample_matches(best.unflatten(0, self.grid_size), position, self.stride, geometry="released")
        read_at = pixels_to_tokens(position, self.stride, geometry="released", grid_size=self.grid_size)
        score = sample_map(height.unflatten(0, self.grid_size)[..., None], read_at)[..., 0]
        return xy / self.to_encoded, torch.ones(len(xy), dtype=torch.bool), score

    def _point_costs(self, points: Tensor, tokens: Tensor, cost: FrameCost) -> FrameCost:
        """Cost maps `[V, P, h, w]` of points between token centres, from the rows of the four tokens round each."""
        around, share = bilinear_tokens(self.tokens_of(points), self.grid_size)
        rows = cost.rows[:, torch.searchsorted(tokens, around)]
        return cost._replace(rows=(rows * share[..., None, None].to(rows.dtype)).sum(2))

    def _locate(self, place: Tensor, cost: FrameCost, expected: Tensor | None) -> Located:
        """Positions in one target frame, in tokens; `place` and `expected` `[P, 2]` in tokens."""
        spread, refine = self.options.path_spread, self.options.refine
        return locate(cost.rows, place, refine=refine, expected=expected, spread=spread, back=cost.back)

    def tokens_of(self, points: Tensor) -> Tensor:
        """Points `[P, 2]` in pixels of the video in tokens."""
        return pixels_to_tokens(points * self.to_encoded, self.stride)

    def _pixels(self, tokens: Tensor) -> Tensor:
        return tokens_to_pixels(tokens, self.stride) / self.to_encoded


def _outwards(frames: Iterable[int], anchor: int) -> list[int]:
    """Frames after the anchor, then those before it, each away from it."""
    return sorted(frames, key=lambda frame: (frame < anchor, abs(frame - anchor)))


def _before(frame: int, anchor: int) -> int:
    """The neighbour of a frame on the anchor's side."""
    return frame - 1 if frame > anchor else frame + 1


def _consistent(located: Located, tolerance: float) -> Tensor:
    """bool `[P]`, whether the match of the match is near the point."""
    if located.miss is None:
        return torch.ones(len(located.xy), dtype=torch.bool)
    return located.miss <= tolerance
