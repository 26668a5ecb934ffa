"""Query points for the command line: a grid on the first frame, or a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_COLUMNS = ("frame", "x", "y")
_ACCEPTED = (
    "accepted are grid:N (N x N points on the first frame) and a CSV file with the columns frame,x,y: frames count"
    " from 0, x and y are pixels from the frame's top left corner"
)


def read_points(spec: str, *, frames: int, height: int, width: int) -> np.ndarray:
    """Query points from `grid:N` or the name of a CSV file.

    Args:
        spec: "grid:16", or a file whose lines are `frame,x,y`. A first line with these names, in any order, is a header
            and says which column is which; without it the order is frame, x, y. Empty lines and lines that begin with
            # are passed over.
        frames, height, width: of the video, in whose pixels the points are given.

    Returns:
        float32 `[P, 3]`, (frame, x, y).

    Raises:
        ValueError: an unknown spec, a file that is missing, empty or has other columns, a number that is not finite, a
            frame that the video does not have, a point outside the frame; the line is named.
    """
    import numpy as np

    if spec.startswith("grid:"):
        return _grid(spec, height, width)
    points = []
    for line, (frame, x, y) in _csv_rows(Path(spec)):
        if frame != math.floor(frame):
            raise ValueError(f"{spec}, line {line}: frame {frame:g} is not a whole number")
        if not 0 <= frame < frames:
            raise ValueError(
                f"{spec}, line {line}: frame {frame:g} is not in the video, which has the frames 0 to {frames - 1}"
            )
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"{spec}, line {line}: the point ({x:g}, {y:g}) is outside the frame; x goes from 0 to {width}, y from"
                f" 0 to {height} pixels"
            )
        points.append((frame, x, y))
    return np.array(points, dtype=np.float32)


def check_points_spec(spec: str) -> None:
    """Refuse what can be refused before the video is known: the wording, a missing, empty or malformed file."""
    if spec.startswith("grid:"):
        _grid(spec, 1, 1)
    else:
        _csv_rows(Path(spec))


def _grid(spec: str, height: int, width: int) -> np.ndarray:
    from corrdit.tracking.queries import MOST_GRID, grid_points, grid_side

    side = grid_side(spec)
    if side is None:
        raise ValueError(f"--points {spec} is not a grid of 1 to {MOST_GRID} points a side; {_ACCEPTED}")
    return grid_points(side, height, width)


def _csv_rows(path: Path) -> list[tuple[int, tuple[float, float, float]]]:
    """(line number, (frame, x, y)) of each row; every number finite."""
    rows = _text_rows(path)
    if not rows:
        raise ValueError(f"the points file {path} is empty; {_ACCEPTED}")
    order = (0, 1, 2)
    names = [cell.lower() for cell in rows[0][1]]
    if not any(_is_number(cell) for cell in names):
        if sorted(names) != sorted(_COLUMNS):
            raise ValueError(f"{path} has the columns {','.join(names)}; {_ACCEPTED}")
        order = (names.index("frame"), names.index("x"), names.index("y"))
        rows = rows[1:]
        if not rows:
            raise ValueError(f"the points file {path} has a header and no points; {_ACCEPTED}")
    points = []
    for line, cells in rows:
        if len(cells) != len(_COLUMNS):
            raise ValueError(f"{path}, line {line} has {len(cells)} columns; {_ACCEPTED}")
        for name, index in zip(_COLUMNS, order, strict=True):
            if not _is_number(cells[index]) or not math.isfinite(float(cells[index])):
                raise ValueError(f"{path}, line {line}: {name} is {cells[index]!r}, not a finite number; {_ACCEPTED}")
        frame, x, y = (float(cells[index]) for index in order)
        points.append((line, (frame, x, y)))
    return points


def _text_rows(path: Path) -> list[tuple[int, list[str]]]:
    if not path.exists():
        raise ValueError(f"--points {path}: there is no such file; {_ACCEPTED}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.reader(file)
            rows = [(table.line_num, [cell.strip() for cell in row]) for row in table]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the points file {path} is not a CSV text file; {_ACCEPTED}") from error
    except OSError as error:
        raise ValueError(f"the points file {path} cannot be read: {error.strerror}") from error
    return [(line, row) for line, row in rows if any(row) and not row[0].startswith("#")]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
