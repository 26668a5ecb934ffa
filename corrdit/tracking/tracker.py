"""Zero-shot point tracking from the queries and keys of a video diffusion transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.tracking.accumulation import CostAccumulator, FrameCost
from corrdit.tracking.chunks import Chunk, anchored_chunks, chained_chunks, last_visits
from corrdit.tracking.costs import ChunkCost, cost_operation
from corrdit.tracking.geometry import bilinear_tokens, pixels_to_tokens, sample_map, sample_matches, tokens_to_pixels
from corrdit.tracking.options import TrackerOptions, tracker_options
from corrdit.tracking.paths import preferred_peaks
from corrdit.tracking.peaks import refined_peaks
from corrdit.tracking.queries import check_queries, check_video
from corrdit.tracking.tracks import Tracks

Progress = Callable[[int, int], None]
ENCODED_TOGETHER = 16
TOKENS_PER_FRAME = 30 * 45
"""Tokens of a frame of 480 x 720 pixels in CogVideoX; the limit where a backbone has no working size of its own."""


class TrackingBackbone(Protocol):
    """What the tracker asks of a video transformer; `corrdit.load_backbone` gives one."""

    layers: int
    heads: int
    preset: Any

    @property
    def token_stride(self) -> tuple[int, int]: ...

    def timestep(self, step: int, inference_steps: int) -> float: ...

    def encode_frames(self, video: Tensor, *, height: int, width: int) -> Tensor: ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: float) -> Tensor: ...

    def forward(
        self, latents: Tensor, timestep: float, operations: Mapping[int, Callable[..., Any]]
    ) -> dict[int, Any]: ...


class PointTracker:
    """Follows points through a video by the attention of a video diffusion transformer, without training.

    Every frame is encoded as a latent of its own; chunks of frames that hold the query's frame go through the
    transformer at one denoising step with the empty prompt, up to the layer asked for; every point takes the position
    of largest query-key cost in each frame. Source: DiffTrack, "Emergent Temporal Correspondences from Video
    Diffusion Transformers" (arXiv 2506.17220), zero-shot point tracking.

    A forward pass is made for every chunk of every distinct query frame: points on one frame share them, points on n
    frames cost n times as much.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        preset: "default" (token centres, sub-token refinement, visibility from consistency) or "published" (DiffTrack's
            released evaluation).
        options: in place of the preset's, see `corrdit.tracking.TrackerOptions`.

    Raises:
        ValueError: an unknown preset or option, or a value out of range.
    """

    def __init__(self, backbone: TrackingBackbone, *, preset: str = "default", **options: Any) -> None:
        self.backbone = backbone
        self.options = tracker_options(preset, options)
        self.layer = _first_given(self.options.layer, backbone.preset.layer)
        if not 0 <= self.layer < backbone.layers:
            raise ValueError(f"layer must be from 0 to {backbone.layers - 1} for this backbone, got {self.layer}")

    @torch.no_grad()
    def track(self, video: Any, queries: Any, *, progress: Progress | None = None) -> Tracks:
        """Where the query points are in every frame of the video.

        Args:
            video: uint8 `[T, H, W, 3]` tensor or array (or an object with such a shape that gives frames by slices).
            queries: `[P, 3]` (frame, x, y), frame a whole number, x and y in pixels from the frame's top left corner.
            progress: called with (forward passes done, forward passes in all).

        Returns:
            `Tracks(xy [T, P, 2] in pixels, visible [T, P], score [T, P])`. At its own query frame a point is visible,
            at the place it was given, with score 1. Elsewhere the score is the cost at the match, in 0 to 1.

        Raises:
            ValueError: the video has fewer than two frames or another layout, or a query lies outside it.
        """
        video = check_video(video)
        frames, height, width = (int(size) for size in video.shape[:3])
        table = check_queries(queries, frames, height, width)
        anchors = sorted({int(frame) for frame in table[:, 0]})
        plans = {anchor: self._chunks(frames, anchor) for anchor in anchors}
        total = sum(len(chunks) for chunks in plans.values())
        run = _Run(self, video, report=_counted(progress, total))
        xy = torch.empty(frames, len(table), 2)
        visible = torch.zeros(frames, len(table), dtype=torch.bool)
        score = torch.zeros(frames, len(table))
        for anchor, chunks in plans.items():
            chosen = (table[:, 0] == anchor).nonzero()[:, 0]
            points = table[chosen, 1:]
            xy[anchor, chosen], visible[anchor, chosen], score[anchor, chosen] = points, True, 1.0
            for frame, found in run.follow(points, chunks).items():
                xy[frame, chosen], visible[frame, chosen], score[frame, chosen] = found
        return Tracks(xy=xy, visible=visible, score=score)

    def _chunks(self, frames: int, anchor: int) -> list[Chunk]:
        options = self.options
        size = _first_given(options.frames_per_chunk, self.backbone.preset.frames_per_chunk)
        if options.schedule == "chained":
            return chained_chunks(frames, anchor, frames_per_chunk=size)
        return anchored_chunks(frames, anchor, frames_per_chunk=size, schedule=options.schedule, stride=options.stride)


Found = tuple[Tensor, Tensor, Tensor]


class _Run:
    """One video on its way through the backbone: the latents of its frames and what each chunk yields."""

    def __init__(self, tracker: PointTracker, video: Any, report: Callable[[], None]) -> None:
        self.options: TrackerOptions = tracker.options
        self.backbone = tracker.backbone
        self.layer = tracker.layer
        self.report = report
        preset = self.backbone.preset
        height, width = int(video.shape[1]), int(video.shape[2])
        encoded = self._encoded_size(height, width)
        self.stride = self.backbone.token_stride
        self.grid_size = (encoded[0] // self.stride[0], encoded[1] // self.stride[1])
        self.to_encoded = torch.tensor([encoded[1] / width, encoded[0] / height])
        inference_steps = _first_given(self.options.inference_steps, preset.inference_steps)
        self.timestep = self.backbone.timestep(_first_given(self.options.step, preset.step), inference_steps)
        self.latents = self._encode(video, *encoded)
        if _first_given(self.options.noise, preset.noise):
            generator = torch.Generator().manual_seed(self.options.seed)
            noise = torch.randn(self.latents.shape, generator=generator).to(self.latents)
            self.latents = self.backbone.add_noise(self.latents, noise, self.timestep)

    def follow(self, points: Tensor, chunks: list[Chunk]) -> dict[int, Found]:
        """For every target frame xy `[P, 2]` in pixels, visible `[P]` and score `[P]` of points `[P, 2]`."""
        if self.options.schedule == "chained":
            return self._follow_chained(points, chunks)
        position = points * self.to_encoded
        accumulator = CostAccumulator(last_visits(chunks), average=self.options.average_overlap)
        found: dict[int, Found] = {}
        maps: dict[int, FrameCost] = {}
        for index, chunk in enumerate(chunks):
            cost = self._chunk_cost(chunk, position)
            for frame, frame_cost in accumulator.add(index, chunk, cost):
                if self.options.geometry == "released":
                    found[frame] = self._read_matches(position, frame_cost)
                else:
                    point_cost = self._point_costs(position, cost.tokens, frame_cost)
                    if self.options.path_spread == 0:
                        found[frame] = self._locate(position, point_cost, None)
                    else:
                        # Half precision holds three digits of a cost, and these are kept until all frames are there.
                        maps[frame] = point_cost._replace(rows=point_cost.rows.half())
        return found if not maps else self._follow_paths(position, chunks[0].source, maps)

    def _follow_paths(self, position: Tensor, anchor: int, maps: dict[int, FrameCost]) -> dict[int, Found]:
        """From the anchor outwards in time, each frame's match near the path so far preferred."""
        found: dict[int, Found] = {}
        for way in (sorted(frame for frame in maps if frame > anchor), sorted(maps, reverse=True)):
            expected = pixels_to_tokens(position, self.stride)
            for frame in way:
                if frame in found:
                    continue
                found[frame] = self._locate(position, maps[frame], expected)
                expected = pixels_to_tokens(found[frame][0] * self.to_encoded, self.stride)
        return found

    def _follow_chained(self, points: Tensor, chunks: list[Chunk]) -> dict[int, Found]:
        """Each chunk starts from the positions found in the last frame of the one before."""
        found: dict[int, Found] = {}
        for chunk in chunks:
            start, seen = (found[chunk.source][:2]) if chunk.source in found else (points, None)
            position = start * self.to_encoded
            cost = self._chunk_cost(chunk, position)
            accumulator = CostAccumulator(last_visits([chunk]), average=False)
            for frame, frame_cost in accumulator.add(0, chunk, cost):
                xy, visible, score = self._locate(position, self._point_costs(position, cost.tokens, frame_cost), None)
                found[frame] = (xy, visible if seen is None else visible & seen, score)
        return found

    def _encoded_size(self, height: int, width: int) -> tuple[int, int]:
        options, preset, stride = self.options, self.backbone.preset, self.backbone.token_stride
        if options.height is None and options.tokens_per_frame is None and preset.height is not None:
            return preset.height, preset.width
        if options.height is None or options.width is None:
            tokens = _first_given(options.tokens_per_frame, preset.tokens_per_frame or TOKENS_PER_FRAME)
            return working_size(height, width, stride, tokens)
        if options.height % stride[0] or options.width % stride[1]:
            raise ValueError(
                f"frames of {options.height} x {options.width} (height x width) are no whole number of tokens of "
                f"{stride[0]} x {stride[1]} pixels; give a multiple of these"
            )
        return options.height, options.width

    def _encode(self, video: Any, height: int, width: int) -> Tensor:
        """Latents `[T, C, lh, lw]`, every frame a latent of its own."""
        parts = []
        for start in range(0, video.shape[0], ENCODED_TOGETHER):
            part = torch.as_tensor(video[start : start + ENCODED_TOGETHER])
            if self.options.resize_first is not None:
                part = resized(part, *self.options.resize_first)
            parts.append(self.backbone.encode_frames(part, height=height, width=width))
        return torch.cat(parts)

    def _chunk_cost(self, chunk: Chunk, position: Tensor) -> ChunkCost:
        """One forward pass: cost rows of the source tokens that the points need, and the way back."""
        tokens = torch.arange(self.grid_size[0] * self.grid_size[1])
        if self.options.geometry == "centers":
            around, _ = bilinear_tokens(pixels_to_tokens(position, self.stride), self.grid_size)
            tokens = around.unique()
        operation = cost_operation(
            tokens,
            self.grid_size,
            source=chunk.frames.index(chunk.source),
            heads=_first_given(self.options.heads, self.backbone.preset.heads),
            head_weights=self._head_weights(),
            bidirectional=self.options.bidirectional,
            way_back=self.options.visibility == "consistency",
            backend=self.options.backend,
            memory_budget=self.options.memory_budget,
        )
        result = self.backbone.forward(self.latents[list(chunk.frames)], self.timestep, {self.layer: operation})
        self.report()
        return ChunkCost(tokens, *result[self.layer])

    def _head_weights(self) -> tuple[float, ...] | None:
        """The weights asked for, those of the preset, or None for the plain mean."""
        if self.options.head_weights is not None:
            return self.options.head_weights or None
        preset = self.backbone.preset
        if preset.head is not None:
            return tuple(float(head == preset.head) for head in range(self.backbone.heads))
        return preset.head_weights

    def _read_matches(self, position: Tensor, cost: FrameCost) -> Found:
        """Positions in one target frame as DiffTrack's released code reads them from the matches of all tokens."""
        best, height = refined_peaks(cost.rows, 0)
        xy = sample_matches(best.unflatten(0, self.grid_size), position, self.stride, geometry="released")
        reading = pixels_to_tokens(position, self.stride, geometry="released", grid_size=self.grid_size)
        score = sample_map(height.unflatten(0, self.grid_size)[..., None], reading)[..., 0]
        return xy / self.to_encoded, torch.ones(len(xy), dtype=torch.bool), score

    def _point_costs(self, position: Tensor, tokens: Tensor, cost: FrameCost) -> FrameCost:
        """Cost maps `[P, h, w]` of points between token centres, from the rows of the four tokens round each."""
        around, share = bilinear_tokens(pixels_to_tokens(position, self.stride), self.grid_size)
        rows = cost.rows[torch.searchsorted(tokens, around)]
        return cost._replace(rows=(rows * share[..., None, None].to(rows.dtype)).sum(1))

    def _locate(self, position: Tensor, cost: FrameCost, expected: Tensor | None) -> Found:
        """Positions in one target frame; `position [P, 2]` in encoded pixels, `expected [P, 2]` in tokens."""
        place = pixels_to_tokens(position, self.stride)
        rows, refine = cost.rows.float(), self.options.refine
        if expected is None:
            peaks, score = refined_peaks(rows, refine)
        else:
            peaks, score = preferred_peaks(rows, expected, spread=self.options.path_spread, refine=refine)
        # A point between the outermost token centres and the border keeps its distance from the centre it is read at.
        last = torch.tensor([self.grid_size[1] - 1.0, self.grid_size[0] - 1.0])
        peaks = peaks + (place - torch.minimum(place.clamp(min=0), last))
        visible = torch.ones(len(peaks), dtype=torch.bool)
        if cost.back is not None:
            tokens_xy = TokenGrid(1, *self.grid_size).coordinates().unflatten(0, self.grid_size)
            returned = peaks + sample_map(cost.back - tokens_xy, peaks)
            visible = (returned - place).norm(dim=-1) <= self.options.tolerance
        return tokens_to_pixels(peaks, self.stride) / self.to_encoded, visible, score


def working_size(height: int, width: int, stride: tuple[int, int], tokens_per_frame: int) -> tuple[int, int]:
    """(height, width) in whole tokens of `stride` pixels, near the video's shape and at most `tokens_per_frame`.

    Frames are never enlarged beyond the next whole token.
    """
    shrink = min(1.0, math.sqrt(tokens_per_frame * stride[0] * stride[1] / (height * width)))
    rows, columns = (max(1, round(size * shrink / step)) for size, step in zip((height, width), stride, strict=True))
    while rows * columns > tokens_per_frame and max(rows, columns) > 1:
        rows, columns = (rows - 1, columns) if rows * width > columns * height else (rows, columns - 1)
    return rows * stride[0], columns * stride[1]


def resized(video: Tensor, height: int, width: int) -> Tensor:
    """uint8 `[T, H, W, 3]` at another size, bilinear with antialiasing."""
    frames = torch.nn.functional.interpolate(
        video.permute(0, 3, 1, 2).float(), size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return frames.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _first_given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _counted(progress: Progress | None, total: int) -> Callable[[], None]:
    """A call for each finished forward pass; `progress` hears how many there were."""
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if progress is not None:
        progress(0, total)
    return report
