"""Files of arrays, numpy's and safetensors: written whole, and read where they may be torn, damaged or something else:
one error says so. Telling values apart."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike

from corrdit.files import written_beside

_DAMAGE = (
    *(ValueError, TypeError, KeyError, EOFError, RuntimeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy raises at such a file, and the libraries beneath it."""

_LARGEST_INFLATED, _LARGEST_FACTOR = 2**26, 500
"""Bytes, and how many times those of the file, above which its arrays are refused."""


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
                _refuse_inflated(archive)
                missing = [name for name in required if name not in archive.files]
                if missing:
                    raise ValueError(f"it lacks {', '.join(missing)} and holds {', '.join(archive.files) or 'nothing'}")
                return {name: archive[name] for name in (*required, *optional) if name in archive.files}
    except _DAMAGE as error:
        raise ValueError(f"{os.fspath(path)} is not {what}: {error}") from error


def _refuse_inflated(archive: np.lib.npyio.NpzFile) -> None:
    """Nothing is read of a small file that says it holds very much."""
    entries = archive.zip.infolist() if archive.zip is not None else []
    whole, packed = sum(entry.file_size for entry in entries), sum(entry.compress_size for entry in entries)
    if whole > _LARGEST_INFLATED and whole > _LARGEST_FACTOR * packed:
        raise ValueError(f"its {packed} bytes inflate to {whole}, which no recorded values do")


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


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: not a safetensors file.
        FileNotFoundError: no file.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, ArrayLike]) -> None:
    """Write a compressed .npz file, beside and then renamed; by any names, as numpy's own function does not.

    Raises:
        ValueError: values that are neither numbers nor text.
    """
    with written_beside(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                array = np.asanyarray(values)
                if array.dtype.hasobject:
                    raise ValueError(f"{name} holds {array.dtype} values; give numbers that fit 64 bits, or text")
                np.lib.format.write_array(entry, array, allow_pickle=False)


def content_digest(*facts: object) -> str:
    """SHA-256 of facts, the same in every process: tensors, arrays, bytes and pictures by their values, functions by
    their names.

    Args:
        facts: what JSON can hold, tensors, arrays, bytes, pictures, functions, and lists, tuples and dictionaries of
            them.
    """
    digest = hashlib.sha256()
    for fact in facts:
        for part in _parts(fact):
            digest.update(part)
    return digest.hexdigest()


def _parts(fact: object) -> Iterator[bytes | memoryview]:
    if isinstance(fact, torch.Tensor):
        yield f"tensor {fact.dtype} {list(fact.shape)}".encode()
        yield fact.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(fact, bytes):
        yield f"bytes {len(fact)}".encode()
        yield fact
    elif isinstance(fact, np.ndarray) or hasattr(fact, "__array_interface__"):
        array = np.asarray(fact)
        yield f"array {array.dtype} {list(array.shape)}".encode()
        if array.dtype.hasobject:
            yield from _parts(array.ravel().tolist())
        else:
            yield array.tobytes()
    elif isinstance(fact, Mapping):
        yield from _parts([part for entry in sorted(fact.items(), key=lambda entry: str(entry[0])) for part in entry])
    elif isinstance(fact, (list, tuple)):
        yield f"list {len(fact)}".encode()
        for entry in fact:
            yield from _parts(entry)
    elif callable(fact):
        kind = fact if hasattr(fact, "__qualname__") else type(fact)
        # The address that stands in a function's text is another one in every process.
        yield f"callable {kind.__module__}.{kind.__qualname__}".encode()
    else:
        yield json.dumps(fact, default=repr).encode()
