"""Contact sheets: some frames of a video side by side, with their numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from corrdit.files import written_beside
from corrdit.video import resize_frame
from corrdit.visualization.figures import INK, figure_pixels, png_bytes

_MARGIN = 16
_GAP = 10
_LABEL = 24
_SHEET_WIDTH = 1600
_LARGEST_CELL = 320
_HIGHEST_CELL = 1000
_LONGEST_SIDE = 1920


def sheet_frames(frames: int, cells: int = 12) -> list[int]:
    """Evenly spaced frame numbers for a sheet of at most `cells` pictures, first and last included."""
    return sorted({round(position) for position in np.linspace(0, frames - 1, min(frames, cells))})


def sheet_columns(cells: int, height: int, width: int) -> int:
    """Columns that make the sheet of `cells` pictures roughly 4:3 without a ragged last row where that is possible."""
    wanted = max(1.0, math.sqrt(cells * 4 / 3 * height / width))
    candidates = range(1, cells + 1)
    return min(candidates, key=lambda columns: abs(math.log(columns / wanted)) + 0.5 * (-cells % columns) / columns)


def cell_size(cells: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels of one picture on a sheet of `cells` pictures of a `height` x `width` video."""
    columns = sheet_columns(cells, height, width)
    cell_width = (_SHEET_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) // columns
    cell_width = min(cell_width, max(320, 2 * width), max(1, _HIGHEST_CELL * width // height))
    return max(1, round(cell_width * height / width)), cell_width


def enlargement(side: int, wanted: int, longest: int) -> int:
    """The whole factor by which small frames are drawn larger: `side` gets to `wanted` pixels, unless the `longest` one
    would pass what a screen shows."""
    return max(1, min(-(-wanted // side), _LONGEST_SIDE // longest))


def fit_columns(pictures: Sequence[np.ndarray], columns: int) -> list[np.ndarray]:
    """Pictures, uint8 `[h, w, 3]`, enlarged or shrunk so that `columns` of them make a sheet's width."""
    width = min(_LARGEST_CELL, (_SHEET_WIDTH - 2 * _MARGIN) // columns - _GAP)
    size = max(1, round(width * pictures[0].shape[0] / pictures[0].shape[1])), width
    return [resize_frame(picture, *size) for picture in pictures]


def contact_sheet(
    pictures: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[str],
    *,
    path: str | os.PathLike[str] | None = None,
    caption: str = "",
    columns: int | None = None,
    colours: int | None = None,
) -> np.ndarray:
    """Put pictures in a grid, each with its label above it.

    Args:
        pictures: uint8 `[h, w, 3]` each, all of one size.
        labels: one for each picture, such as "frame 12".
        path: PNG file to write (beside, then renamed); None writes nothing.
        caption: a line below the grid.
        columns: of the grid, in which the pictures then keep their size; None chooses both.
        colours: of the file, 2 to 256, which is then smaller; None for all.

    Returns:
        The sheet, uint8 `[sheet height, sheet width, 3]`.

    Raises:
        ValueError: no pictures, different sizes, a label too few or too many, a path that does not end in .png.
    """
    if len(pictures) == 0 or len(pictures) != len(labels):
        raise ValueError(f"{len(pictures)} pictures and {len(labels)} labels were given; one label for each is needed")
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"the pictures have different sizes: {sorted(shapes)}; a contact sheet needs one size")
    if path is not None and Path(path).suffix.lower() != ".png":
        raise ValueError(f"a contact sheet is a PNG file; {path} does not end in .png")
    height, width = pictures[0].shape[:2]
    cell = cell_size(len(pictures), height, width) if columns is None else (height, width)
    sheet, corners = laid_out(pictures, columns or sheet_columns(len(pictures), height, width), cell, bool(caption))
    sheet = write_labels(sheet, corners, labels, caption)
    if path is not None:
        with written_beside(path) as file:
            file.write(png_bytes(sheet, colours))
    return sheet


def laid_out(
    pictures: Sequence[np.ndarray] | np.ndarray, columns: int, cell: tuple[int, int], caption: bool
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """White sheet with the pictures on it, and the (row, column) pixel of each picture's top left corner."""
    rows = -(-len(pictures) // columns)
    height = _MARGIN + rows * (_LABEL + cell[0] + _GAP) - _GAP + _MARGIN + (_LABEL if caption else 0)
    width = 2 * _MARGIN + columns * (cell[1] + _GAP) - _GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    corners = []
    for index, picture in enumerate(pictures):
        top = _MARGIN + _LABEL + (index // columns) * (_LABEL + cell[0] + _GAP)
        left = _MARGIN + (index % columns) * (cell[1] + _GAP)
        sheet[top : top + cell[0], left : left + cell[1]] = resize_frame(picture, *cell)
        corners.append((top, left))
    return sheet, corners


def write_labels(
    sheet: np.ndarray, corners: Sequence[tuple[int, int]], labels: Sequence[str], caption: str
) -> np.ndarray:
    """A sheet with a label above each of its pictures and a line below them."""
    from matplotlib.figure import Figure

    height, width = sheet.shape[:2]
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.figimage(sheet, 0, 0, origin="upper")
    for (top, left), label in zip(corners, labels, strict=True):
        figure.text(left / width, 1 - (top - 6) / height, label, fontsize=13, color=INK, va="baseline")
    if caption:
        figure.text(_MARGIN / width, (_MARGIN - 4) / height, caption, fontsize=12, color=INK, va="baseline")
    return figure_pixels(figure)
