"""Positions below the token: the same transformer looks again at enlarged crops round the points.

A token of the whole frame spans many pixels of a large video. Once a point is found to about a token, crops of the
frames round it, at a scale where a token spans fewer pixels, go through the transformer in the same chunks, and the
point is located again in each. The cost grows with the number of points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corrdit.geometry import bilinear_tokens
from corrdit.grid import TokenGrid
from corrdit.tracking.chunks import Chunk
from corrdit.tracking.encoding import FrameStore, resized
from corrdit.tracking.peaks import Located, locate
from corrdit.tracking.queries import Frames
from corrdit.tracking.readings import ReadBackbone, Reading, cost_rows, read_tokens

TOKENS_TOGETHER = 2**14
"""Tokens of the crops that go through the transformer in one batch."""


class CropLevel:
    """One scale at which points are looked at again.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        reading: what is read of it.
        video: gives uint8 `[t, H, W, 3]` by slices.
        size: (height, width) in pixels of the frames the crops are cut from.
        tokens: of a crop's side; smaller frames are taken whole.
        refine: radius of the cost-weighted mean, see `corrdit.tracking.peaks`.
        spread: preference for the place looked at, see `corrdit.tracking.peaks`.
        way_back: whether the match of each match is asked for.
        antialias: of the resized frames.
        frames_kept: frames of that size held in memory.
    """

    def __init__(
        self,
        backbone: ReadBackbone,
        reading: Reading,
        video: Frames,
        size: tuple[int, int],
        *,
        tokens: int,
        refine: int,
        spread: float,
        way_back: bool,
        antialias: bool,
        frames_kept: int,
    ) -> None:
        self.backbone, self.reading = backbone, reading
        self.refine, self.spread, self.way_back = refine, spread, way_back
        rows, columns = (
            max(1, min(tokens, side // step)) for side, step in zip(size, backbone.token_stride, strict=True)
        )
        self.grid_size = (rows, columns)
        self.stride = torch.tensor(backbone.token_stride[::-1])
        self.crop = torch.tensor([columns, rows]) * self.stride
        self.size = torch.maximum(torch.tensor(size[::-1]), self.crop)
        self.scale = self.size / torch.tensor([video.shape[2], video.shape[1]])
        height, width = int(self.size[1]), int(self.size[0])
        self.pictures = FrameStore(
            video, lambda part, _: resized(part, height, width, antialias=antialias), frames_kept
        )

    def batches(self, points: int, chunk: Chunk) -> int:
        """Batches of crops that `points` points make in a chunk."""
        return -(-points // self._together(chunk))

    def _together(self, chunk: Chunk) -> int:
        return max(1, TOKENS_TOGETHER // (len(chunk.frames) * self.grid_size[0] * self.grid_size[1]))

    def look(
        self, points: Tensor, near: dict[int, Tensor], chunk: Chunk, report: Callable[[], None]
    ) -> dict[int, Located]:
        """Points located again in the target frames of a chunk.

        Args:
            points: `[P, 2]` in pixels of the video, in the chunk's source frame.
            near: for each target frame `[P, 2]` in pixels of the video, where each is looked for.
            chunk: frames of the forward pass.
            report: called after each forward pass.

        Returns:
            For each target frame positions in pixels of the video; `miss` in tokens of the crop.
        """
        self.pictures.load(chunk.frames)
        parts: list[dict[int, Located]] = []
        for start in range(0, len(points), self._together(chunk)):
            part = slice(start, start + self._together(chunk))
            centers = [points[part] if frame == chunk.source else near[frame][part] for frame in chunk.frames]
            parts.append(self._look(torch.stack(centers, 1) * self.scale, chunk, report))
        return {frame: _joined([part[frame] for part in parts]) for frame in chunk.targets}

    def _look(self, centers: Tensor, chunk: Chunk, report: Callable[[], None]) -> dict[int, Located]:
        """`centers [B, F, 2]` in pixels of this level's frames."""
        origins = self._origins(centers)
        source = chunk.frames.index(chunk.source)
        latents = self._latents(origins, chunk)
        noise = None
        if self.reading.noise:
            generator = torch.Generator().manual_seed(self.reading.seed)
            noise = torch.randn(latents.shape[1:], generator=generator).to(latents).expand_as(latents)
        pair = read_tokens(self.backbone, latents, self.reading, self.grid_size, noise)
        for _ in range(self.reading.passes):
            report()
        every = torch.arange(self.grid_size[0] * self.grid_size[1])
        rows = cost_rows(pair, self.reading, every, source=source)
        back = None
        if self.way_back:  # `[B, F, h, w, 2]` the source token (x, y) that each target token fits best
            back = TokenGrid(1, *self.grid_size).coordinates()[rows.mean(1).argmax(1)]
        places = (centers - origins) / self.stride - 0.5
        rows = _rows_at(rows, places[:, source], self.grid_size)
        found = {}
        for index, frame in enumerate(chunk.frames):
            if frame == chunk.source:
                continue
            located = locate(
                rows[:, :, index].transpose(0, 1),
                places[:, source],
                refine=self.refine,
                expected=places[:, index],
                spread=self.spread,
                back=None if back is None else back[:, index],
            )
            pixels = (located.xy + 0.5) * self.stride + origins[:, index]
            found[frame] = located._replace(xy=pixels / self.scale)
        return found

    def _origins(self, centers: Tensor) -> Tensor:
        """int64 `[B, F, 2]` top left corners (x, y), inside the frame, that put each centre near a token's centre."""
        middle = torch.tensor(self.grid_size[::-1]).div(2, rounding_mode="floor") + 0.5
        origins = (centers - middle * self.stride).round().long().clamp(min=0)
        return torch.minimum(origins, self.size - self.crop)

    def _latents(self, origins: Tensor, chunk: Chunk) -> Tensor:
        """`[B, F, C, h, w]` of the crops with these corners."""
        frames = self.pictures.of(chunk.frames)
        columns = origins[..., :1] + torch.arange(int(self.crop[0]))
        rows = origins[..., 1:] + torch.arange(int(self.crop[1]))
        place = torch.arange(len(chunk.frames))[None, :, None, None]
        crops = frames[place, rows[..., :, None], columns[..., None, :]]
        height, width = int(self.crop[1]), int(self.crop[0])
        latents = self.backbone.encode_frames(crops.flatten(0, 1), height=height, width=width)
        return latents.unflatten(0, origins.shape[:2])


def _rows_at(rows: Tensor, place: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """`[B, V, F, h, w]` cost maps of places `[B, 2]` between the tokens that `rows [B, V, S, F, h, w]` are of."""
    around, share = bilinear_tokens(place, grid_size)
    batch = torch.arange(len(rows))[:, None]
    chosen = rows.transpose(1, 2)[batch, around]
    return (chosen * share[:, :, None, None, None, None]).sum(1)


def _joined(parts: list[Located]) -> Located:
    misses = [part.miss for part in parts if part.miss is not None]
    return Located(
        torch.cat([part.xy for part in parts]),
        torch.cat([part.score for part in parts]),
        torch.cat(misses) if misses else None,
    )
