"""Tracks drawn over a video: dots with fading trails, anti-aliased, placed with sub-pixel accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from corrdit.video import resize_frame
from corrdit.visualization.colours import position_colours

if TYPE_CHECKING:
    from corrdit.tracking import Tracks

_SMALLEST_SIDE = 240
_ENLARGED_SIDE = 320


@dataclass(frozen=True)
class TrackStyle:
    """How tracks are drawn.

    Args:
        trail: number of past frames whose path is drawn behind a point; 0 draws dots only.
        radius: of a dot, in pixels of the drawn picture; None follows the picture's size.
        fade: how far the video is moved towards a darker grey, 0 to 1, so that the colours stand out.
        hidden: draw points that are not visible (hollow, with a dotted look of their trail) or leave them out.
    """

    trail: int = 16
    radius: float | None = None
    fade: float = 0.45
    hidden: bool = True

    def __post_init__(self) -> None:
        if self.trail < 0:
            raise ValueError(f"trail={self.trail} was given; accepted is a number of frames, 0 or more")
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius={self.radius} was given; accepted is a positive number of pixels, or None")
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
        tracks: Tracks,
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
        self._figure, self._axes = _transparent_figure(self.size)

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
        layer = self._render(index)
        alpha = layer[..., 3:].astype(np.float32) / 255
        return (picture * (1 - alpha) + layer[..., :3] * alpha + 0.5).astype(np.uint8)

    def _render(self, index: int) -> np.ndarray:
        """The tracks alone, uint8 `[h, w, 4]`, not premultiplied."""
        self._axes.clear()
        self._axes.set(xlim=(0, self.size[1]), ylim=(self.size[0], 0))
        self._axes.axis("off")
        self._add_trails(index)
        self._add_dots(index)
        self._figure.canvas.draw()
        return np.asarray(self._figure.canvas.buffer_rgba())

    def _add_trails(self, index: int) -> None:
        from matplotlib.collections import LineCollection

        first = max(0, index - self.style.trail)
        if first == index:
            return
        path = self._xy[first : index + 1].swapaxes(0, 1)
        segments = np.stack((path[:, :-1], path[:, 1:]), axis=2)
        seen = (self._visible[first:index] & self._visible[first + 1 : index + 1]).T
        if self.style.hidden:
            strength = np.where(seen, 1.0, 0.35)
        else:
            strength = seen.astype(np.float64)
        age = np.arange(index - first, 0, -1) - 1
        alpha = strength * (1 - age / self.style.trail) ** 1.2
        moved = np.linalg.norm(segments[:, :, 1] - segments[:, :, 0], axis=-1) > 1e-3
        chosen = moved & (alpha > 0.01)
        colours = np.concatenate(
            (np.broadcast_to(self._colours[:, None], (*alpha.shape, 3)), alpha[..., None]), axis=-1
        )
        dark = np.concatenate((np.zeros((*alpha.shape, 3)), 0.45 * alpha[..., None]), axis=-1)
        for colour, width in ((dark, 0.9 * self._radius + 1.4), (colours, 0.9 * self._radius)):
            lines = LineCollection(segments[chosen], colors=colour[chosen], linewidths=width, capstyle="butt")
            self._axes.add_collection(lines, autolim=False)

    def _add_dots(self, index: int) -> None:
        inside = ((self._xy[index] >= -2) & (self._xy[index] <= np.array(self.size[::-1]) + 2)).all(-1)
        visible = self._visible[index] & inside
        halo = max(0.9, 0.3 * self._radius)
        clear, dark = (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.7)
        if self.style.hidden:
            hidden, ring = self._xy[index, ~self._visible[index] & inside], self._radius
            self._circles(hidden, ring, clear, dark, 0.4 * self._radius + halo)
            self._circles(hidden, ring, clear, self._colours[~self._visible[index] & inside], 0.4 * self._radius)
        self._circles(self._xy[index, visible], self._radius + halo, dark, clear, 0)
        self._circles(self._xy[index, visible], self._radius, self._colours[visible], clear, 0)

    def _circles(self, centres: np.ndarray, radius: float, face: Any, edge: Any, rim: float) -> None:
        from matplotlib.collections import EllipseCollection

        if len(centres) == 0:
            return
        diameters = np.full(len(centres), 2 * radius)
        self._axes.add_collection(
            EllipseCollection(
                diameters,
                diameters,
                np.zeros(len(centres)),
                units="xy",
                offsets=centres,
                offset_transform=self._axes.transData,
                facecolors=face,
                edgecolors=edge,
                linewidths=rim,
                snap=False,
            ),
            autolim=False,
        )


def iterate_drawn_tracks(
    frames: Iterable[np.ndarray],
    tracks: Tracks,
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
    tracks: Tracks,
    *,
    starts: np.ndarray | None = None,
    size: tuple[int, int] | None = None,
    style: TrackStyle | None = None,
) -> np.ndarray:
    """Draw tracks over a video: a dot for each point, coloured by where it starts, with a fading trail.

    Visible points are filled dots, hidden ones hollow rings with a faint trail.

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


def _comfortable_size(height: int, width: int) -> tuple[int, int]:
    shorter = min(height, width)
    factor = 1 if shorter >= _SMALLEST_SIDE else -(-_ENLARGED_SIDE // shorter)
    return height * factor, width * factor


def _dot_radius(size: tuple[int, int], points: int) -> float:
    """Radius in pixels: follows the picture's size, smaller where points are dense."""
    spacing = (size[0] * size[1] / max(points, 1)) ** 0.5
    return float(np.clip(0.10 * spacing, 0.0045 * min(size) + 0.6, 0.008 * min(size) + 1.0))


def _transparent_figure(size: tuple[int, int]) -> tuple[Any, Any]:
    """A figure without pyplot, so that no global state is touched and threads can draw side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[1] / 72, size[0] / 72), dpi=72, facecolor=(0, 0, 0, 0))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.patch.set_alpha(0)
    return figure, axes
