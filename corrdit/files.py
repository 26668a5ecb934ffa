"""Writing files and folders so that nobody ever sees half of one, and telling contents apart."""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
_PART = re.compile(r"\..*\.(?P<machine>[0-9a-f]{6})-(?P<process>\d{1,9})-[0-9a-f]{4}\.part", re.DOTALL)
_PART_OF_EARLIER_VERSIONS = re.compile(r"\.part-.*|\..*\d+-[0-9a-f]+\.part", re.DOTALL)
_SECONDS_OF_OTHER_MACHINES = 24 * 3600
"""So long unfinished files of other machines, whose processes cannot be asked for, are left alone."""
_LONGEST_NAME = 180
"""Bytes of a name to which something is added; file systems take 255."""
_MOST_ALIASES = 20
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file in the folder of `path` and rename it to `path` when the block ends without an error.

    The contents are on the disk before the rename, so a crash leaves either the old file or the whole new one. After
    an exception the temporary file is gone and `path` is untouched.

    Args:
        path: the file to write; its folder must exist.
        mode: "wb" for bytes or "w" for UTF-8 text.

    Raises:
        ValueError: another mode, or a link that leads nowhere.
        FileNotFoundError: the folder does not exist.
        OSError: the folder cannot be written or the disk is full.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f'mode must be "wb" (bytes) or "w" (text), got {mode!r}')
    path = Path(path)
    refuse_broken_link(path)
    if not path.parent.is_dir():
        what = "is a file" if path.parent.exists() else "does not exist; make it first"
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} {what}")
    beside = path.parent / _part_name(path.name)
    remover = _begun(functools.partial(beside.unlink, missing_ok=True))
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
    finally:
        _removers.remove(remover)


def remove_own_unfinished() -> None:
    """Remove what this process has begun to write and not finished, for one that is about to end without unwinding."""
    for remove in list(_removers):
        with contextlib.suppress(OSError):
            remove()


_removers: list[Callable[[], None]] = []
"""Of the unfinished files and folders of this process."""


def _begun(remover: Callable[[], None]) -> Callable[[], None]:
    _removers.append(remover)
    return remover


def refuse_broken_link(path: Path) -> None:
    """Raises ValueError where what is to be written, or a folder it lies in, is a link that leads nowhere."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"cannot write {path}: {place} is a link to {os.readlink(place)}, which does not exist; remove the"
                " link or give another name"
            )


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a folder for results, which need not be there yet.

    Raises:
        ValueError: an empty name, a file, or a link that leads nowhere.
    """
    if not os.fspath(path):
        raise ValueError("the output folder is an empty name; give a folder, which is made if need be")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output folder {folder} is a file; give a folder, which is made if need be")
    refuse_broken_link(folder)
    return folder


class OutputFolder:
    """`with OutputFolder("results") as folder:` write files into `folder`; they appear in `results` when all is done.

    Files are written into a hidden folder on the same disk: beside a new output folder, which then appears by one
    rename, or inside an existing one (also one that another process has made meanwhile), into which the files are then
    renamed one after another (files of the same name are replaced, others stay). After an exception, Ctrl-C included,
    the hidden folder is gone, folders that had to be made are gone, and what was there before is untouched. Hidden
    folders of processes that were killed are removed when the next one begins.

    Args:
        path: the folder, made if need be.
        last: name of the file that is put into an existing folder after all others.
        whole: whether an existing folder is replaced, and nothing in it stays.

    Raises:
        ValueError: the path is a file or a link that leads nowhere, cannot be made or cannot be written.
        OSError: the disk is full, in words that name the folder.
    """

    def __init__(self, path: str | os.PathLike[str], *, last: str | None = None, whole: bool = False) -> None:
        self.path = output_folder(path)
        self._last, self._whole = last, whole
        self._made: list[Path] = []
        self._hidden: Path | None = None

    def __enter__(self) -> Path:
        target = output_folder(self.path).absolute()
        try:
            self._make_parents(target.parent)
            name = _part_name(target.name)
            for place in (target.parent, target):
                remove_unfinished(place, target.name)
            hidden = (target if target.is_dir() and not self._whole else target.parent) / name
            hidden.mkdir()
        except OSError as error:
            self._remove_made()
            raise ValueError(
                f"cannot write into the output folder {self.path}: {error.strerror}; give one that can be written"
            ) from error
        self._hidden = hidden
        self._remover = _begun(functools.partial(self._remove, hidden))
        return hidden

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        _removers.remove(self._remover)
        try:
            if error is None:
                self._publish(hidden)
        except BaseException:
            self._remove(hidden)
            raise
        self._remove(hidden, keep_made=error is None)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise OSError(f"the disk of the output folder {self.path} is full; nothing was written there") from error

    def _publish(self, hidden: Path) -> None:
        target = self.path.absolute()
        if self._whole and target.is_dir():
            old = target.parent / _part_name(target.name)
            os.rename(target, old)
            os.rename(hidden, target)
            shutil.rmtree(old, ignore_errors=True)
            return
        if hidden.parent != target:
            try:
                os.rename(hidden, target)
                return
            except OSError:
                if not target.is_dir():
                    raise
        for file in sorted(hidden.iterdir(), key=lambda file: (file.name == self._last, file.name)):
            place = target / file.name
            if place.exists() and (place.is_dir() or file.is_dir()):
                # A folder is not renamed over anything; the old one goes when the hidden folder does.
                os.rename(place, hidden / f".{secrets.token_hex(4)}.old")
            os.replace(file, place)

    def _make_parents(self, folder: Path) -> None:
        if not folder.exists():
            self._make_parents(folder.parent)
            folder.mkdir(exist_ok=True)
            self._made.append(folder)

    def _remove(self, hidden: Path, keep_made: bool = False) -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        if not keep_made:
            self._remove_made()

    def _remove_made(self) -> None:
        while self._made:
            with contextlib.suppress(OSError):  # somebody else may have put a file into it meanwhile
                self._made.pop().rmdir()


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove hidden files and folders of processes that ended before they could rename them.

    Args:
        folder: which is looked through, without its subfolders; nothing happens where there is none.
        name: only those that would have become the file or folder of this name; None for all.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.name.startswith("." if name is None else f".{short_name(name)}.") or not _is_left(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def short_name(name: str) -> str:
    """A name to which something may be added: itself, or its beginning and a digest where it is very long."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_NAME else f"{name[:40]}-{hashlib.sha256(encoded).hexdigest()[:12]}"


def _part_name(name: str) -> str:
    return f".{short_name(name)}.{_MACHINE}-{os.getpid()}-{secrets.token_hex(2)}.part"


def _is_left(path: Path) -> bool:
    """Whether a hidden file or folder is unfinished and nobody is at work on it."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return _PART_OF_EARLIER_VERSIONS.fullmatch(path.name) is not None
    if part["machine"] != _MACHINE:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _SECONDS_OF_OTHER_MACHINES
        return False
    try:
        os.kill(int(part["process"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user
        return False
    return False


def write_json(path: Path, contents: Mapping[str, object]) -> None:
    """Write a JSON file, whole; ValueError for numbers JSON does not have."""
    with written_beside(path, "w") as file:
        json.dump(contents, file, indent=1, allow_nan=False)
        file.write("\n")


def parsed_json(text: str) -> Any:
    """What a text in JSON holds; raises ValueError for another text, and for nesting deeper than can be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> dict[str, object]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else, or is cut off.
    """
    contents = parsed_json(path.read_text(encoding="utf-8"))
    if not isinstance(contents, dict):
        raise ValueError(f"it holds {type(contents).__name__}, not an object")
    return contents


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines and lines that begin with # are passed over.

    Raises:
        ValueError: no such file, not UTF-8 text, or no prompt in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"there is no file of prompts {path}; give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); give a text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return prompts


def files_digest(paths: Iterable[str | os.PathLike[str]]) -> str:
    """SHA-256 of the contents of several files in their order. Raises FileNotFoundError for one that is missing."""
    return hashlib.sha256("".join(map(file_digest, paths)).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's contents, or of names and contents of the files in a folder, hidden ones apart.

    Raises:
        FileNotFoundError: neither.
    """
    digest = hashlib.sha256()
    place = Path(path)
    if place.is_dir():
        for file in sorted(place.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                digest.update(f"{file.name}\0{file_digest(file)}\n".encode())
        return digest.hexdigest()
    with open(place, "rb") as contents:
        while block := contents.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_address(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for an address of the web or of a store (https://..., s3://...) in place of a file's path."""
    # A `Path` has lost one of the slashes.
    if _ADDRESS.match(os.fspath(path)) and not os.path.exists(path):
        raise ValueError(f"{os.fspath(path)} is an address, and only files and folders are read; download it first")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with a line end."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def refuse_nested_aliases(contents: str | bytes, name: str) -> None:
    """Refuse YAML whose aliases may stand for more than memory holds; what is no YAML is for its reader to say.

    Raises:
        ValueError: more aliases than settings have.
    """
    import yaml

    with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(contents, yaml.SafeLoader))
        if aliases > _MOST_ALIASES:
            raise ValueError(f"{name} has {aliases} YAML aliases (at most {_MOST_ALIASES}); write its values out")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the columns of the first one, beside and then renamed; None becomes an empty cell.

    Texts that a spreadsheet would take for a formula, names of videos among them, get an apostrophe before them.
    """
    with written_beside(path, "w") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in rows)


def _no_formula(cell: object) -> object:
    """OWASP, "CSV Injection"."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
