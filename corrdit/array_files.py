"""Numpy's files: written whole, and read where they may be torn, damaged or something else: one error says so."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from corrdit.files import written_beside

_DAMAGE = (
    *(ValueError, TypeError, KeyError, EOFError, RuntimeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy raises at such a file, and the libraries beneath it."""


def read_arrays(
    path: str | os.PathLike[str], required: Iterable[str], *, what: str, optional: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Arrays of an .npz file by name; nothing in it is unpickled.

    Args:
        path: of the file.
        required: names of arrays that have to be there.
        what: what the file should be, for the message.
        optional: names of arrays that are taken where they are there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or one without a required array.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds a single array")
            with archive:
                missing = [name for name in required if name not in archive.files]
                if missing:
                    raise ValueError(f"it lacks {', '.join(missing)} and holds {', '.join(archive.files) or 'nothing'}")
                return {name: archive[name] for name in (*required, *optional) if name in archive.files}
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)} is not {what}: {error}") from error


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an .npy file; nothing in it is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a damaged one.
    """
    try:
        with open(path, "rb") as file:
            values = np.load(file, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)} is not an array as numpy saves it: {error}") from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{os.fspath(path)} holds several arrays; one is expected")
    return values


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, ArrayLike]) -> None:
    """Write a compressed .npz file, beside and then renamed."""
    named: dict[str, Any] = dict(arrays)
    with written_beside(path) as file:
        np.savez_compressed(file, **named)
