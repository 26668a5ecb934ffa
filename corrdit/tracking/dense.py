"""Where every pixel of one frame goes: displacement and visibility in all frames, as pictures and in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from corrdit.array_files import write_arrays
from corrdit.progress import Progress, hidden_bars, progress_or_bar
from corrdit.tracking.tracks import Tracks

if TYPE_CHECKING:
    from corrdit.video import StreamedVideo

DENSE_FILES = ("dense.npz", "dense.mp4", "dense.png")
SHEET_SIDE = 320
"""Pixels of the longer side of a picture on the sheet."""
_HIDDEN = 0.35
"""Brightness of the colours of points that are hidden."""


@dataclass(frozen=True, eq=False)
class DenseTracks:
    """Tracks of a regular grid of points of one frame.

    Attributes:
        start: float32 `[h, w, 2]` (x, y) in pixels, where the points are in their own frame.
        displacement: float32 `[T, h, w, 2]` (dx, dy) in pixels from there to their place in each frame.
        visible: bool `[T, h, w]`: the match of the match leads back to the point (with `visibility="consistency"`).
        score: float32 `[T, h, w]`, cost at the match.
        frame: theirs.
    """

    start: Tensor
    displacement: Tensor
    visible: Tensor
    score: Tensor
    frame: int

    def resized(self, factor: tuple[float, float]) -> DenseTracks:
        """In pixels of frames (x, y) times as large."""
        scale = torch.tensor(factor, dtype=torch.float32)
        return DenseTracks(self.start * scale, self.displacement * scale, self.visible, self.score, self.frame)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed .npz file with the attributes by name, beside and then renamed."""
        write_arrays(path, {name: np.asarray(value) for name, value in vars(self).items()})


class AskedReading(Protocol):
    """A `corrdit.tracking.VideoReading`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def track(self, queries: object) -> Tracks: ...


def dense_tracks(
    reading: AskedReading, frame: int, every: int, together: int, progress: Progress | None
) -> DenseTracks:
    """Tracks of the centres of the `every` x `every` cells of a frame, so many points at a time."""
    _, height, width = reading.shape[:3]
    rows, columns = max(1, height // every), max(1, width // every)
    down, across = (torch.arange(rows) + 0.5) * min(every, height), (torch.arange(columns) + 0.5) * min(every, width)
    y, x = torch.meshgrid(down, across, indexing="ij")
    start = torch.stack((x, y), -1)
    points = torch.cat((torch.full((rows * columns, 1), float(frame)), start.flatten(0, 1)), 1)
    parts: list[Tracks] = []
    report = progress_or_bar(progress, "points")
    for part in points.split(together):
        report(together * len(parts), len(points))
        with hidden_bars():
            parts.append(reading.track(part))
    report(len(points), len(points))
    xy, visible, score = (
        torch.cat([getattr(part, name) for part in parts], 1).unflatten(1, (rows, columns))
        for name in ("xy", "visible", "score")
    )
    return DenseTracks(start, xy - start, visible, score, frame)


def write_dense_results(
    folder: str | os.PathLike[str],
    video: StreamedVideo,
    dense: DenseTracks,
    *,
    progress: Progress | None = None,
) -> None:
    """Write `DENSE_FILES` into a folder: the arrays, and the displacement as colours (hue its direction, white none).

    Colours of hidden points are dark. Full colour is the length that 95 in 100 visible displacements stay below.

    Args:
        folder: an existing folder.
        video: what was tracked.
        dense: in pixels of the file.
        progress: called with (frames drawn, frames in all).
    """
    from corrdit.video import VideoWriter, fit_size, resize_frame
    from corrdit.visualization import contact_sheet, flow_colours
    from corrdit.visualization.sheet import sheet_frames

    folder = Path(folder)
    dense.save(folder / DENSE_FILES[0])
    lengths = dense.displacement.norm(dim=-1)[dense.visible].sort().values
    # A single wrong match would leave all others white.
    largest = float(lengths[int(0.95 * (len(lengths) - 1))])
    frames, height, width = video.shape[:3]
    cell = fit_size(height, width, SHEET_SIDE)
    chosen, shown = sheet_frames(frames, 6), []
    with VideoWriter(folder / DENSE_FILES[1], video.info.fps) as writer:
        for frame, (moved, seen) in enumerate(zip(dense.displacement, dense.visible, strict=True)):
            colours = flow_colours(moved.numpy(), largest=largest or 1.0)
            shade = np.where(seen.numpy()[..., None], 1.0, _HIDDEN)
            picture = resize_frame((colours * shade).astype(np.uint8), height, width)
            writer.write(picture)
            if frame in chosen:
                shown.append(resize_frame(picture, *cell))
            if progress is not None:
                progress(frame + 1, frames)
    pictures = [resize_frame(video[frame : frame + 1][0], *cell) for frame in chosen]
    labels = [f"frame {frame}" for frame in chosen]
    caption = f"displacement from frame {dense.frame}; full colour is {largest:.1f} pixels, dark is hidden"
    contact_sheet([*pictures, *shown], labels * 2, path=folder / DENSE_FILES[2], caption=caption, columns=len(chosen))
