"""Tracks drawn over a video: dots with fading trails, anti-aliased, placed with sub-pixel accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from corrdit.video import VideoWriter, resize_frame
from corrdit.visualization.colours import position_colours
from corrdit.visualization.sheet import cell_size, contact_sheet, enlargement, sheet_frames

_SMALLEST_SIDE = 240
_ENLARGED_SIDE = 320


class DrawableTracks(Protocol):
    """What is drawn: xy `[T, P, 2]` in pixels of the video and visible `[T, P]`, as `corrdit.Tracks` has them."""

    @property
    def xy(self) -> Tensor | np.ndarray: ...

    @property
    def visible(self) -> Tensor | np.ndarray: ...


@dataclass(frozen=True)
class TrackStyle:
    """How tracks are drawn.

    Args:
        trail: number of past frames whose path is drawn behind a point; 0 draws dots only.
        radius: of a dot, in pixels of the drawn picture; None follows the picture's size.
        fade: how far the video is moved towards a darker grey, 0 to 1, so that the colours stand out.
        hidden: draw points that are not visible, as hollow rings, or leave them out. Trails are drawn only between
            frames in which a point is visible: where it is hidden, its place is a guess.
        leap: a step from one frame to the next that is longer than this share of the picture's diagonal gets no trail;
            it is a mismatch or a cut rather than a motion, and its line would only cover the picture.

    Where the tracks have a score, a place that is less certain than most of its video is drawn fainter.
    """

    trail: int = 6
    radius: float | None = None
    fade: float = 0.45
    hidden: bool = True
    leap: float = 0.08

    def __post_init__(self) -> None:
        if self.trail < 0:
            raise ValueError(f"trail={self.trail} was given; accepted is a number of frames, 0 or more")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius={self.radius} was given; accepted is a positive number of pixels, or None")
        if not self.leap >= 0:
            raise ValueError(f"leap={self.leap} was given; accepted is a share of the picture's diagonal, 0 or more")
        if not 0 <= self.fade <= 1:
            raise ValueError(f"fade={self.fade} was given; accepted is a number from 0 (as is) to 1 (dark grey)")


class TrackPainter:
    """Draws the tracks of one video on its frames, one frame at a time.

    Args:
        tracks: xy `[T, P, 2]` in pixels of the video, visible `[T, P]`.
        height, width: of the video whose pixels `tracks` are given in.
        starts: float `[P, 2]`, (x, y) that give the colours; None takes the positions in frame 0.
        size: (height, width) of the drawn pictures. None keeps the video's size, but enlarges videos whose shorter side
            is under 240 pixels by a whole number, because dots and trails need room.
        style: see `TrackStyle`.
    """

    def __init__(
        self,
        tracks: DrawableTracks,
        height: int,
        width: int,
        *,
        starts: np.ndarray | None = None,
        size: tuple[int, int] | None = None,
        style: TrackStyle | None = None,
    ) -> None:
        self.style = style or TrackStyle()
        self.size = size or _comfortable_size(height, width)
        self._xy = np.asarray(tracks.xy, dtype=np.float64) * (self.size[1] / width, self.size[0] / height)
        self._visible = np.asarray(tracks.visible, dtype=bool)
        self._colours = position_colours(np.asarray(tracks.xy)[0] if starts is None else starts, height, width)
        if len(self._colours) != self._xy.shape[1]:
            raise ValueError(f"starts has {len(self._colours)} points, the tracks have {self._xy.shape[1]}")
        self._radius = self.style.radius or _dot_radius(self.size, self._xy.shape[1])
        self._opacity = _opacity(getattr(tracks, "score", None), self._visible)

    @property
    def frames(self) -> int:
        """Number of frames the tracks cover."""
        return len(self._xy)

    def draw(self, frame: np.ndarray, index: int) -> np.ndarray:
        """Frame `index` of the video (uint8 `[H, W, 3]`) with the tracks on it: uint8 `[h, w, 3]` of the drawn size."""
        if not 0 <= index < self.frames:
            raise ValueError(f"frame {index} was asked for; the tracks have frames 0 to {self.frames - 1}")
        picture = resize_frame(frame, *self.size).astype(np.float32)
        if self.style.fade:
            grey = 0.75 * picture.mean(-1, keepdims=True)
            picture += self.style.fade * (grey - picture)
        canvas = _Canvas(*self.size)
        self._add_trails(canvas, index)
        self._add_dots(canvas, index)
        layer = canvas.pixels()
        alpha = layer[..., 3:].astype(np.float32) / 255
        return (picture * (1 - alpha) + layer[..., :3] * alpha + 0.5).astype(np.uint8)

    def _add_trails(self, canvas: _Canvas, index: int) -> None:
        first = max(0, index - self.style.trail)
        if first == index:
            return
        path = self._xy[first : index + 1]
        seen = self._visible[first:index] & self._visible[first + 1 : index + 1]
        age = np.arange(index - first, 0, -1)[:, None] - 1
        certain = np.minimum(self._opacity[first:index], self._opacity[first + 1 : index + 1])
        alpha = np.where(seen, certain * (1 - age / self.style.trail) ** 1.2, 0.0)
        step = np.linalg.norm(np.diff(path, axis=0), axis=-1)
        chosen = (step > 1e-3) & (step <= self.style.leap * np.hypot(*self.size)) & (alpha > 0.01)
        segments = np.stack((path[:-1], path[1:]), axis=2)[chosen]
        colours = np.broadcast_to(self._colours, (*alpha.shape, 3))[chosen]
        width = 0.6 * self._radius
        canvas.lines(segments, _with_opacity(0.0 * colours, 0.45 * alpha[chosen]), width + 1.4)
        canvas.lines(segments, _with_opacity(colours, alpha[chosen]), width)

    def _add_dots(self, canvas: _Canvas, index: int) -> None:
        place, radius = self._xy[index], self._radius
        halo, rim = max(0.9, 0.3 * radius), 0.4 * radius
        inside = ((place >= -radius) & (place <= np.array(self.size[::-1]) + radius)).all(-1)
        if self.style.hidden:
            hidden = inside & ~self._visible[index]
            canvas.rings(place[hidden], radius, _with_opacity(0.0 * self._colours[hidden], 0.5), rim + halo)
            canvas.rings(place[hidden], radius, _with_opacity(self._colours[hidden], 0.8), rim)
        seen = inside & self._visible[index]
        opacity = self._opacity[index][seen]
        canvas.discs(place[seen], radius + halo, _with_opacity(0.0 * self._colours[seen], 0.7 * opacity))
        canvas.discs(place[seen], radius, _with_opacity(self._colours[seen], opacity))


def _opacity(score: Tensor | np.ndarray | None, visible: np.ndarray) -> np.ndarray:
    """`[T, P]` in 0.25 to 1: full from the median score of the visible places of a video on, which differs by model."""
    if score is None or not visible.any():
        return np.ones(visible.shape)
    values = np.nan_to_num(np.asarray(score, dtype=np.float64))
    usual = np.median(values[visible])
    return np.clip(values / usual, 0.25, 1.0) if usual > 0 else np.ones(visible.shape)


def _with_opacity(colours: np.ndarray, opacity: np.ndarray | float) -> np.ndarray:
    """`[N, 3]` with an opacity for each or all: `[N, 4]`."""
    return np.column_stack((colours, np.broadcast_to(opacity, len(colours))))


def iterate_drawn_tracks(
    frames: Iterable[np.ndarray],
    tracks: DrawableTracks,
    height: int,
    width: int,
    *,
    starts: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    style: TrackStyle | None = None,
) -> Iterator[np.ndarray]:
    """As `draw_tracks`, for frames that come one after another (all of one size), so that none but one is held.

    `height` and `width` are those of the video that `tracks` is given in; the frames themselves may be smaller.
    """
    painter = TrackPainter(tracks, height, width, starts=starts, size=size, style=style)
    for index, frame in enumerate(frames):
        yield painter.draw(frame, index)


def draw_tracks(
    video: np.ndarray,
    tracks: DrawableTracks,
    *,
    starts: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    style: TrackStyle | None = None,
) -> np.ndarray:
    """Draw tracks over a video: a dot for each point, coloured by where it starts, with a fading trail.

    Visible points are filled dots, hidden ones hollow rings; see `TrackStyle`.

    Args:
        video: uint8 `[T, H, W, 3]`.
        tracks: xy `[T, P, 2]` (x, y) in pixels of `video`, visible `[T, P]`.
        starts: float `[P, 2]`, (x, y) that give the colours, for queries on other frames than 0; None takes frame 0.
        size: (height, width) of the drawn pictures; None keeps the video's, or enlarges it if it is under 240 pixels.
        style: see `TrackStyle`.

    Returns:
        uint8 `[T, h, w, 3]`.

    Raises:
        ValueError: the video and the tracks have different numbers of frames, or another shape or type.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"the video is {video.dtype} {list(video.shape)}; accepted is uint8 [T, H, W, 3]")
    if len(video) != len(tracks.xy):
        raise ValueError(f"the video has {len(video)} frames, the tracks have {len(tracks.xy)}; they must agree")
    height, width = video.shape[1:3]
    drawn = iterate_drawn_tracks(video, tracks, height, width, starts=starts, size=size, style=style)
    return np.stack(list(drawn))


def write_track_pictures(
    frames: Iterable[np.ndarray],
    tracks: DrawableTracks,
    size: tuple[int, int],
    *,
    queries: np.ndarray,
    fps: float,
    video_path: str | os.PathLike[str],
    sheet_path: str | os.PathLike[str],
    style: TrackStyle | None = None,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw tracks over a video and write it with its contact sheet, holding one frame at a time.

    Args:
        frames: uint8 `[H, W, 3]`, one after another.
        tracks: xy `[T, P, 2]` in pixels, visible `[T, P]`.
        size: (height, width) of the video in whose pixels `tracks` is given.
        queries: float `[P, 3]`, (frame, x, y); their places give the colours.
        fps: frames per second of the written video.
        video_path: .mp4, .mov or .gif; sheet_path: .png.
        style: see `TrackStyle`.
        numbers: what the frames are called on the sheet; None counts them.
        progress: called with (frames done, frames in all).
    """
    total = len(tracks.xy)
    chosen = sheet_frames(total)
    starts = np.asarray(queries)[:, 1:]
    painter = TrackPainter(tracks, *size, starts=starts, style=style)
    cell_painter = TrackPainter(tracks, *size, starts=starts, style=style, size=cell_size(len(chosen), *size))
    cells = []
    with VideoWriter(video_path, fps) as writer:
        for index, frame in enumerate(frames):
            writer.write(painter.draw(frame, index))
            if index in chosen:
                cells.append(cell_painter.draw(frame, index))
            if progress is not None:
                progress(index + 1, total)
        visible = 100 * float(np.asarray(tracks.visible).mean())
        legend = (
            "Filled dots are visible, faint ones uncertain, rings hidden"
            if painter.style.hidden
            else "Hidden points are left out"
        )
        legend = f"{legend}; colours tell where a point starts."
        contact_sheet(
            cells,
            [f"frame {index if numbers is None else numbers[index]}" for index in chosen],
            path=sheet_path,
            caption=f"{tracks.xy.shape[1]} point{'s' * (tracks.xy.shape[1] != 1)}, {visible:.0f} % visible. {legend}",
        )


def _comfortable_size(height: int, width: int) -> tuple[int, int]:
    shorter = min(height, width)
    factor = 1 if shorter >= _SMALLEST_SIDE else enlargement(shorter, _ENLARGED_SIDE, max(height, width))
    return height * factor, width * factor


def _dot_radius(size: tuple[int, int], points: int) -> float:
    """Radius in pixels: follows the picture's size, smaller where points are dense."""
    spacing = (size[0] * size[1] / max(points, 1)) ** 0.5
    return float(np.clip(0.10 * spacing, 0.0045 * min(size) + 0.6, 0.008 * min(size) + 1.0))


class _Canvas:
    """Anti-aliased shapes at sub-pixel positions on a transparent picture, by Matplotlib's Agg.

    No pyplot, so no global state is touched. Each collection gets its line width twice: Agg draws a collection whose
    properties are all single as markers, which it puts on whole pixels.
    """

    def __init__(self, height: int, width: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.transforms import Affine2D

        # at 72 dots per inch a point is a pixel
        self._figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=(0, 0, 0, 0))
        self._canvas = FigureCanvasAgg(self._figure)
        self._downwards = Affine2D.from_values(1, 0, 0, -1, 0, height)

    def lines(self, segments: np.ndarray, colours: np.ndarray, width: float) -> None:
        """`segments [N, 2, 2]` (start and end, (x, y)), `colours [N, 4]`."""
        from matplotlib.collections import LineCollection

        look: dict[str, Any] = {
            "linewidths": (width, width),
            "capstyle": "butt",
            "snap": False,
            "transform": self._downwards,
        }
        if len(segments):
            self._figure.add_artist(LineCollection(list(segments), colors=colours, **look), clip=False)

    def rings(self, centres: np.ndarray, radius: float, colours: np.ndarray, width: float) -> None:
        """`centres [N, 2]` (x, y), `colours [N, 4]`."""
        self._circles(centres, radius, facecolors="none", edgecolors=colours, linewidths=(width, width))

    def discs(self, centres: np.ndarray, radius: float, colours: np.ndarray) -> None:
        """`centres [N, 2]` (x, y), `colours [N, 4]`."""
        self._circles(centres, radius, facecolors=colours, edgecolors="none", linewidths=(0, 0))

    def pixels(self) -> np.ndarray:
        """uint8 `[h, w, 4]`, not premultiplied."""
        self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())

    def _circles(self, centres: np.ndarray, radius: float, **properties: Any) -> None:
        from matplotlib.collections import CircleCollection

        area, place = np.full(max(len(centres), 2), np.pi * radius**2), self._downwards
        if len(centres):
            circles = CircleCollection(area, offsets=centres, offset_transform=place, snap=False, **properties)
            self._figure.add_artist(circles, clip=False)
