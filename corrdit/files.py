"""Writing a file so that nobody ever sees half of it, and going on only with what was made alike."""

from __future__ import annotations

import contextlib
import csv
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def refuse_other_settings(output: str | os.PathLike[str], earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder's results were made with other settings than those of now, and says which."""
    changed = [name for name in now if earlier.get(name) != now[name]]
    if changed:
        said = ", ".join(f"{name} {earlier.get(name)!r} (now {now[name]!r})" for name in changed)
        raise ValueError(
            f"{os.fspath(output)} holds results made with other settings: {said}; give another output folder, or the "
            "same settings to go on"
        )


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file in the folder of `path` and rename it to `path` when the block ends without an error.

    The contents are on the disk before the rename, so a crash leaves either the old file or the whole new one. After
    an exception the temporary file is gone and `path` is untouched.

    Args:
        path: the file to write; its folder must exist.
        mode: "wb" for bytes or "w" for UTF-8 text.

    Raises:
        ValueError: another mode.
        FileNotFoundError: the folder does not exist.
        OSError: the folder cannot be written or the disk is full.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'mode must be "wb" (bytes) or "w" (text), got {mode!r}')
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")
    beside = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with open(beside, "xb" if mode == "wb" else "x", encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        raise


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the columns of the first one, beside and then renamed; None becomes an empty cell."""
    with written_beside(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
