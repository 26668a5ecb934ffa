"""Folders of png or jpg frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from corrdit.video.info import ACCEPTED, DEFAULT_FPS, FRAME_SUFFIXES, VIDEO_SUFFIXES, VideoInfo


def folder_info(folder: Path) -> VideoInfo:
    """Size and number of the frames in a folder."""
    frames, others = frame_files(folder)
    height, width = _read_picture(frames[0]).shape[:2]
    remarks = []
    if others:
        names = ", ".join(path.name for path in others)
        remarks.append(f"{folder} holds frames numbered like {frames[0].name}; {names} is not read as one of them")
    return VideoInfo(folder, height, width, DEFAULT_FPS, len(frames), remarks=tuple(remarks))


def check_not_mixed(folder: Path, names: list[str]) -> None:
    """Refuse a folder, holding files of these names, of both videos and pictures: it may be meant as either."""
    videos, pictures = (
        sorted(name for name in names if name.lower().endswith(suffixes))
        for suffixes in (VIDEO_SUFFIXES, FRAME_SUFFIXES)
    )
    if videos and pictures:
        raise ValueError(
            f"the folder {folder} holds videos ({videos[0]}{', ...' if len(videos) > 1 else ''}) and pictures"
            f" ({pictures[0]}{', ...' if len(pictures) > 1 else ''}), so it is neither a folder of videos nor one of"
            " frames; move the one or the other elsewhere"
        )


def frame_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The frames of a folder in natural order of their names (2 before 10), and pictures that are none of them.

    Where names are numbered alike (0001.png, 0002.png, ...), a single picture named in another way (thumbnail.png) is
    no frame.

    Raises:
        ValueError: no pictures, videos beside them, or several series of numbered frames.
    """
    files = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    check_not_mixed(folder, [entry.name for entry in files])
    pictures = sorted((entry for entry in files if entry.suffix.lower() in FRAME_SUFFIXES), key=_natural_order)
    if not pictures:
        raise ValueError(f"the folder {folder} holds no png or jpg frames ({len(files)} other files); {ACCEPTED}")
    series: dict[str, list[Path]] = {}
    for path in pictures:
        series.setdefault(re.sub("[0-9]+", "#", path.stem), []).append(path)
    numbered = [paths for pattern, paths in series.items() if "#" in pattern and len(paths) > 1]
    if not numbered:
        return pictures, []
    if len(numbered) > 1 or any(len(paths) > 1 for paths in series.values() if paths is not numbered[0]):
        names = ", ".join(f"{paths[0].name} ({len(paths)})" for paths in series.values())
        raise ValueError(f"the folder {folder} holds several series of pictures: {names}; give a folder for each")
    return numbered[0], [path for path in pictures if path not in set(numbered[0])]


def folder_frames(folder: Path, start: int) -> Iterator[np.ndarray]:
    """Frames of one size, uint8 `[H, W, 3]`, from number `start` on."""
    first_shape = None
    for path in frame_files(folder)[0][start:]:
        pixels = _read_picture(path)
        if first_shape is None:
            first_shape = pixels.shape
        elif pixels.shape != first_shape:
            height, width = first_shape[:2]
            raise ValueError(
                f"{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, the frames before it {height}x{width}; all"
                " frames of a folder must have one size"
            )
        yield pixels


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which frame2 comes before frame10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part.lower()) for part in parts if part]


def _read_picture(path: Path) -> np.ndarray:
    import imageio.v3 as imageio

    try:
        pixels = imageio.imread(path, plugin="pillow")
        if pixels.dtype == np.uint16:  # Pillow clips 16-bit grey instead of scaling it
            pixels = (pixels // 257).astype(np.uint8)
        else:
            pixels = imageio.imread(path, plugin="pillow", mode="RGB", rotate=True)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"the frame {path} cannot be read as a picture ({error})") from error
    return np.repeat(pixels[..., None], 3, axis=-1) if pixels.ndim == 2 else pixels
