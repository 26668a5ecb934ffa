"""Query points for the command line: a grid on the first frame, or a CSV file."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_COLUMNS = ("frame", "x", "y")
_WHOLE = re.compile(r"0|-?[1-9][0-9]*")
_AS_LABEL = re.compile(r"[+-]?0[0-9]")
OWN_NAMES = ("xy", "visible", "score", "queries", "hdr", "point")
"""Of arrays and columns in the files of results."""
_ACCEPTED = (
    "accepted are grid:N (N x N points on the first frame) and a CSV file with the columns frame,x,y: frames count"
    " from 0, x and y are pixels from the frame's top left corner; further columns, such as label, need a first line"
    " with the names of all"
)


def read_points(spec: str, *, frames: int, height: int, width: int) -> np.ndarray:
    """Query points from `grid:N` or the name of a CSV file.

    Args:
        spec: "grid:16", or a file whose lines are `frame,x,y`. A first line with these names, in any order and among
            others, is a header and says which column is which; without it the order is frame, x, y. Empty lines and
            lines that begin with # are passed over.
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
    for line, (frame, x, y), _ in _csv_rows(Path(spec)):
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


def point_columns(spec: str) -> dict[str, np.ndarray]:
    """Further columns of a points file by name, such as labels: whole numbers, numbers, or text `[P]`."""
    import numpy as np

    rows = [] if spec.startswith("grid:") else [further for _, _, further in _csv_rows(Path(spec))]
    columns: dict[str, np.ndarray] = {}
    for name in rows[0] if rows else ():
        columns[name] = np.array(_values([row[name] for row in rows]))
    return columns


def _values(cells: list[str]) -> list[int] | list[float] | list[str]:
    """Numbers where they all are some that float64 or int64 holds and that are not written as labels, such as 007."""
    whole = [_WHOLE.fullmatch(cell) is not None for cell in cells]
    if all(whole) and all(abs(int(cell)) < 2**63 for cell in cells):
        return [int(cell) for cell in cells]
    exact = all(abs(int(cell)) <= 2**53 for cell, is_whole in zip(cells, whole, strict=True) if is_whole)
    if exact and all(_is_number(cell) and not _AS_LABEL.match(cell) for cell in cells):
        return [float(cell) for cell in cells]
    return cells


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


def _csv_rows(path: Path) -> list[tuple[int, tuple[float, float, float], dict[str, str]]]:
    """(line number, (frame, x, y), further cells by column) of each row; every number finite."""
    rows = _text_rows(path)
    if not rows:
        raise ValueError(f"the points file {path} is empty; {_ACCEPTED}")
    names = list(_COLUMNS)
    if not any(_is_number(cell) for cell in rows[0][1]):
        names = _header(path, rows[0][1])
        rows = rows[1:]
        if not rows:
            raise ValueError(f"the points file {path} has a header and no points; {_ACCEPTED}")
    points = []
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}, line {line} has {len(cells)} columns; {_ACCEPTED}")
        row = dict(zip(names, cells, strict=True))
        for name in _COLUMNS:
            if not _is_number(row[name]) or not math.isfinite(float(row[name])):
                raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}, not a finite number; {_ACCEPTED}")
        frame, x, y = (float(row.pop(name)) for name in _COLUMNS)
        points.append((line, (frame, x, y), row))
    return points


def _header(path: Path, cells: list[str]) -> list[str]:
    """Names of the columns: frame, x and y in small letters, others as they stand."""
    names = [cell.lower() if cell.lower() in _COLUMNS else cell for cell in cells]
    if not set(_COLUMNS) <= set(names) or len(set(names)) < len(names):
        raise ValueError(f"{path} has the columns {','.join(names)}; {_ACCEPTED}")
    if taken := [name for name in names if name in OWN_NAMES or not name]:
        raise ValueError(
            f"{path} has a column named {taken[0]!r}, as the results name their own; call it otherwise, such as label"
        )
    return names


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
    return "_" not in text
