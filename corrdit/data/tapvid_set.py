"""A TAP-Vid data set by name and number: an index of its videos, each read when it is asked for.

Sources are TAP-Vid's own files (one pickle, or a folder of shards) and folders that `corrdit world` wrote. Of a
pickle or shard the raw contents are in memory, jpeg frames still encoded; of a set of shards one shard at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from corrdit.array_files import content_digest, read_arrays
from corrdit.data.annotated_clips import annotated_clip, annotated_files, annotated_name, clip_files
from corrdit.data.tapvid import TapVidVideo, annotated_video, file_entries, pickle_files
from corrdit.files import file_digest, files_digest, refuse_address

WORLD_ARRAYS = ("video", "xy", "visible")


@dataclass(frozen=True)
class TapVidEntry:
    """Where a video of a set is.

    Args:
        name: unique within the set, as `read_tapvid` names it.
        file: name of its file within the set.
        position: its number in the file.
        error: why the file could not be read; such an entry stands for all that the file may hold.
        digest: of its frames, points and occlusions as they are stored.
    """

    name: str
    file: str
    position: int = 0
    error: str | None = None
    digest: str = field(default="", compare=False)


class TapVidSet:
    """The videos of a TAP-Vid file, a folder of shards or a folder of generated videos.

    Args:
        path: a pickle (DAVIS, RGB-Stacking), a folder of shards `NNNN_of_NNNN.pkl` (Kinetics) or of other pickles
            (RoboTAP), a folder that `corrdit world` wrote (`NNNN.npz`), or one of `corrdit.data.annotated_clips`.
        incomplete: whether shards may be missing.

    Attributes:
        annotated: whether these are clips of `corrdit.data.annotated_clips`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder with neither shards nor generated videos, or with some shards missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, incomplete: bool = False) -> None:
        refuse_address(path)
        self.path = Path(path)
        self.annotated = False
        self._loaded: tuple[str, Sequence[tuple[str, object]]] | None = None
        if not self.path.is_dir():
            if not self.path.exists():
                raise FileNotFoundError(
                    f"{path} does not exist; give a TAP-Vid file, or a folder of its shards, of generated videos or of "
                    "annotated clips"
                )
            self.files, self._in_folder, self._sharded = [self.path.name], False, False
            return
        self._in_folder = True
        self._sharded = any(self.path.glob("*.pkl"))
        if self._sharded:
            self.files = [file.name for file in pickle_files(self.path, incomplete=incomplete)]
        else:
            self.files = sorted(file.name for file in self.path.glob("*.npz"))
            if not self.files:
                self.files, self.annotated = annotated_files(self.path), True
        if not self.files:
            raise ValueError(
                f"{path} holds neither pickles (shards named like 0000_of_0010.pkl, or others) nor videos of `corrdit "
                "world` (0000.npz) nor annotated clips (NAME.json beside NAME.mp4, NAME_flow_gt.png); give such a "
                "folder or a TAP-Vid file"
            )

    def index(self) -> list[TapVidEntry]:
        """All videos in the order of files and of their place in them; shards are opened one after another.

        A file of several that cannot be read is one entry with its `error`.

        Raises:
            ValueError: the set is a single file, and it cannot be read.
        """
        entries: list[TapVidEntry] = []
        for file in self.files:
            try:
                entries += self._entries_of(file)
            except ValueError as error:
                if not self._in_folder:
                    raise
                name = annotated_name(file) if self.annotated else file
                entries.append(TapVidEntry(name, file, error=str(error)))
        return entries

    def read(self, entry: TapVidEntry) -> TapVidVideo:
        """One video; quick for videos of the file that was read last.

        Raises:
            ValueError: its file or its contents are broken; the message names them.
        """
        if entry.error is not None:
            raise ValueError(entry.error)
        if entry.file.endswith(".npz"):
            return _world_video(entry.name, self.path / entry.file)
        if self.annotated:
            return annotated_clip(self.path / entry.file)
        _, contents = self._contents(entry.file)[entry.position]
        return annotated_video(entry.name, contents)

    def _entries_of(self, file: str) -> Iterator[TapVidEntry]:
        if file.endswith(".npz"):
            return iter([TapVidEntry(Path(file).stem, file, digest=file_digest(self.path / file))])
        if self.annotated:
            try:
                digest = files_digest(clip_files(self.path / file))
            except OSError as error:
                raise ValueError(f"{self.path / file}: {error}") from error
            return iter([TapVidEntry(annotated_name(file), file, digest=digest)])
        prefix = f"{Path(file).stem}/" if self._sharded else ""
        return (
            TapVidEntry(prefix + name, file, position, digest=content_digest(contents))
            for position, (name, contents) in enumerate(self._contents(file))
        )

    def _contents(self, file: str) -> Sequence[tuple[str, object]]:
        if self._loaded is None or self._loaded[0] != file:
            self._loaded = None  # the old file goes before the new one comes
            path = self.path / file if self._in_folder else self.path
            self._loaded = (file, file_entries(path))
        return self._loaded[1]


def _world_video(name: str, path: Path) -> TapVidVideo:
    """A video of `corrdit world`: positions in pixels `[T, P, 2]` to shares `[P, T, 2]`."""
    what = "a video of `corrdit world` (.npz)"
    try:
        video, xy, visible = read_arrays(path, WORLD_ARRAYS, what=what).values()
    except OSError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if video.ndim != 4 or xy.ndim != 3 or visible.shape != xy.shape[:2]:
        raise ValueError(
            f"{path}: video, xy and visible must be [T, H, W, 3], [T, P, 2] and [T, P], got {video.shape}, {xy.shape} "
            f"and {visible.shape}"
        )
    shares = xy.transpose(1, 0, 2) / np.array([video.shape[2], video.shape[1]], dtype=np.float64)
    return TapVidVideo(name=name, video=video, points=shares, occluded=~visible.astype(bool).T)
