"""The file of results: read, added to, and written beside and renamed after every measurement."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence

from corrdit.benchmark.comparisons import COMPARISONS
from corrdit.benchmark.runner import BOTH, FORWARD, Piece, Row, Settings
from corrdit.benchmark.shapes import SHAPES
from corrdit.files import written_beside

FILE = "results.json"
Key = tuple[str, str, str, str]


def key_of(row: Row) -> Key:
    """Operation, shape, pass and competitor: what a row is about."""
    return row["operation"], row["shape"]["name"], row["pass"], row["competitor"]


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a file, none where it does not exist.

    Raises:
        ValueError: it is no file of results.
    """
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows: list[Row] = content["rows"]
        for row in rows:
            key_of(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no rows that corrdit bench wrote ({type(error).__name__}: {error}); "
            "give another folder to --output"
        ) from error
    return rows


def write_rows(path: pathlib.Path, command: str, rows: Iterable[Row]) -> None:
    """Results as one JSON object: the command and the rows."""
    with written_beside(path, "w") as file:
        json.dump({"command": command, "rows": list(rows)}, file, indent=1)
        file.write("\n")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows in place of old ones of the same key, in the order of shapes and operations."""
    rows = {key_of(row): row for row in [*old, *new]}
    order = (list(SHAPES), list(COMPARISONS), [FORWARD, BOTH])

    def place(row: Row) -> list[int]:
        names = (row["shape"]["name"], row["operation"], row["pass"])
        return [known.index(name) if name in known else len(known) for name, known in zip(names, order, strict=True)]

    return sorted(rows.values(), key=place)


def missing(piece: Piece, settings: Settings, rows: Sequence[Row], where: Row) -> list[str]:
    """Competitors of a piece without a row that was measured in the same surroundings: commit, device, versions."""
    measured = {key_of(row) for row in rows if all(row.get(name) == value for name, value in where.items())}
    return [
        name
        for name in piece.competitors(settings)
        if (piece.operation, piece.shape.name, piece.passes, name) not in measured
    ]


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """Our own rows without a time."""
    return [row for row in rows if row["competitor"].startswith("corrdit ") and "left_out" in row]
