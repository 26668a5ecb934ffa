"""Writing TAP-Vid files, for one's own annotated or generated videos."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from corrdit.arguments import choice, whole_number
from corrdit.data.tapvid import TapVidVideo
from corrdit.files import written_beside

LAYOUTS = ("dict", "list")
FRAME_FORMATS = ("raw", "jpeg")
JPEG_QUALITY = 95


def write_tapvid(
    path: str | os.PathLike[str], videos: Iterable[TapVidVideo], *, layout: str = "dict", frames: str = "raw"
) -> None:
    """Write one file, as DAVIS (a dict by name) or RGB-Stacking (a list) are.

    Args:
        path: the file; it appears when it is whole.
        videos: at least one; names must differ with `layout="dict"`.
        layout: "dict" or "list"; a list keeps no names.
        frames: "raw" uint8 frames or "jpeg" files (smaller; not exactly the same frames).

    Raises:
        ValueError: no video, two of one name, an unknown option.
    """
    choice("layout", layout, LAYOUTS)
    choice("frames", frames, FRAME_FORMATS)
    entries = [(video.name, _entry(video, frames)) for video in videos]
    if not entries:
        raise ValueError("videos is empty; a TAP-Vid file holds at least one")
    by_name = dict(entries)
    if layout == "dict" and len(by_name) < len(entries):
        raise ValueError("two videos have the same name; a dict file needs different names")
    _dump(Path(path), by_name if layout == "dict" else [entry for _, entry in entries])


def write_tapvid_shards(
    folder: str | os.PathLike[str], videos: Iterable[TapVidVideo], *, count: int, shards: int, frames: str = "jpeg"
) -> None:
    """Write a folder of shards as Kinetics' is, all or none; one shard is in memory at a time.

    Args:
        folder: made where missing; must hold no shards.
        videos: read one after another.
        count: how many videos there are.
        shards: number of files, at most `count`.
        frames: "raw" or "jpeg".

    Raises:
        ValueError: another number of videos than `count`, more shards than videos, a folder that holds shards.
    """
    choice("frames", frames, FRAME_FORMATS)
    count, shards = whole_number("count", count, 1), whole_number("shards", shards, 1)
    if shards > count:
        raise ValueError(f"{count} videos cannot fill {shards} shards; give at most {count}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*_of_*.pkl")):
        raise ValueError(f"{folder} already holds shards; give an empty folder")
    written: list[Path] = []
    try:
        _write_shards(folder, iter(videos), count, shards, frames, written)
    except BaseException:
        for file in written:
            file.unlink()
        raise


def _write_shards(
    folder: Path, source: Iterator[TapVidVideo], count: int, shards: int, frames: str, written: list[Path]
) -> None:
    """Write one shard after another and note each file in `written`."""
    read = 0
    for shard in range(shards):
        size = (shard + 1) * count // shards - shard * count // shards
        entries = [_entry(video, frames) for video in itertools.islice(source, size)]
        read += len(entries)
        if len(entries) < size:
            raise ValueError(f"videos ended after {read}, count says {count}; nothing was written")
        file = folder / f"{shard:04}_of_{shards:04}.pkl"
        _dump(file, entries)
        written.append(file)
    if next(source, None) is not None:
        raise ValueError(f"there are more videos than count={count}; nothing was written")


def _entry(video: TapVidVideo, frames: str) -> dict[str, np.ndarray]:
    pictures = video.video
    if frames == "jpeg":
        import imageio.v3 as imageio

        encoded = [
            imageio.imwrite("<bytes>", frame, extension=".jpg", plugin="pillow", quality=JPEG_QUALITY)
            for frame in video.video
        ]
        pictures = np.array(encoded)
    return {"video": pictures, "points": video.points, "occluded": video.occluded}


def _dump(path: Path, contents: object) -> None:
    with written_beside(path) as file:
        pickle.dump(contents, file, protocol=4)
