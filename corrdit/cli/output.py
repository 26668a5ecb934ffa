"""An output folder that gets all of its files or none."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputFolder:
    """`with OutputFolder("results") as folder:` write files into `folder`; they appear in `results` when all is done.

    Files are written into a hidden folder on the same disk: beside a new output folder, which then appears by one
    rename, or inside an existing one, into which the files are then renamed one after another (files of the same name
    are replaced, others stay). After an exception, Ctrl-C included, the hidden folder is gone, folders that had to be
    made are gone, and what was there before is untouched.

    Raises:
        ValueError: the path is a file, cannot be made or cannot be written.
        OSError: the disk is full, in words that name the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._hidden: Path | None = None

    def __enter__(self) -> Path:
        name = f".corrdit-{os.getpid()}-{secrets.token_hex(4)}.part"
        target = self.path.absolute()
        if target.exists() and not target.is_dir():
            raise ValueError(f"the output folder {self.path} is a file; give a folder, which is made if need be")
        try:
            self._make_parents(target.parent)
            hidden = (target if target.is_dir() else target.parent) / name
            hidden.mkdir()
        except OSError as error:
            self._remove_made()
            raise ValueError(
                f"cannot write into the output folder {self.path}: {error.strerror}; give one that can be written"
            ) from error
        self._hidden = hidden
        return hidden

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
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
        if hidden.parent == target:
            for file in sorted(hidden.iterdir()):
                place = target / file.name
                if place.exists() and (place.is_dir() or file.is_dir()):
                    # A folder is not renamed over anything; the old one goes when the hidden folder does.
                    os.rename(place, hidden / f".{secrets.token_hex(4)}.old")
                os.replace(file, place)
        else:
            os.rename(hidden, target)

    def _make_parents(self, folder: Path) -> None:
        if not folder.exists():
            self._make_parents(folder.parent)
            folder.mkdir()
            self._made.append(folder)

    def _remove(self, hidden: Path, keep_made: bool = False) -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        if not keep_made:
            self._remove_made()

    def _remove_made(self) -> None:
        while self._made:
            with contextlib.suppress(OSError):  # somebody else may have put a file into it meanwhile
                self._made.pop().rmdir()
