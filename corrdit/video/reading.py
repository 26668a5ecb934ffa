"""Reading videos frame by frame: container files through PyAV, folders of frames through imageio."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

_CONTAINER_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
_ACCEPTED = "accepted are mp4, mov, webm, mkv, avi and gif files and folders of png or jpg frames"
DEFAULT_FPS = 24.0  # of a folder of frames, which says nothing about its rate


@dataclass(frozen=True)
class Video:
    """A video in memory: `frames` uint8 `[T, H, W, 3]` in RGB and `fps`, frames per second."""

    frames: np.ndarray
    fps: float


@dataclass(frozen=True)
class VideoInfo:
    """What is known before decoding: displayed size in pixels, frames per second, estimated number of frames."""

    path: Path
    height: int
    width: int
    fps: float
    frames: int


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, rate and estimated length of a video file or folder of frames.

    Raises:
        ValueError: nothing is at `path`, or it is not a video.
    """
    path = _existing(path)
    if path.is_dir():
        pictures = _frame_files(path)
        height, width = _read_picture(pictures[0]).shape[:2]
        return VideoInfo(path, height, width, DEFAULT_FPS, len(pictures))
    with _open_container(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        frames = stream.frames
        first = next(_decode(container, path), None)
        if first is None:
            raise ValueError(f"{path} holds no frames that can be decoded; {_ACCEPTED}")
        height, width = first.height, first.width
        if first.rotation % 180:
            height, width = width, height
    return VideoInfo(path, height, width, fps, frames or _count_packets(path))


def iterate_frames(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    max_frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[np.ndarray]:
    """Decode a video frame by frame; only one frame is held at a time.

    Args:
        path: a video file, or a folder of png or jpg frames in natural order of their names.
        start: number of frames to skip at the beginning.
        max_frames: stop after this many frames; None reads to the end.
        size: (height, width) in pixels that every frame is resized to while it is read; None keeps the size of the
            first frame.

    Yields:
        uint8 `[H, W, 3]`, RGB.

    Raises:
        ValueError: as `read_video`.
    """
    _check_part(start, max_frames)
    path = _existing(path)
    decoded = _folder_frames(path, start, size) if path.is_dir() else _file_frames(path, start, size)
    for count, frame in enumerate(decoded, start=1):
        yield frame
        if count == max_frames:
            return


def read_video(
    path: str | os.PathLike[str],
    *,
    max_frames: int | None = None,
    start: int = 0,
    max_side: int | None = None,
    fps: float | None = None,
    min_frames: int = 2,
) -> Video:
    """Read a video into memory.

    Args:
        path: an mp4, mov, webm, mkv, avi or gif file, or a folder of png or jpg frames sorted naturally (2 before 10).
        max_frames: read at most this many frames; None reads all.
        start: number of frames to skip at the beginning.
        max_side: shrink frames while reading so that the longer side has at most this many pixels; None keeps them.
        fps: frames per second to report instead of the file's own (24 for folders).
        min_frames: fewest frames accepted; the default is 2 because tracking needs two.

    Returns:
        `Video` with frames uint8 `[T, H, W, 3]`.

    Raises:
        ValueError: nothing at `path`, not a video, damaged, too few frames, frames of different sizes in a folder.
    """
    info = probe_video(path)
    size = fit_size(info.height, info.width, max_side)
    expected = max(info.frames - start, 1)
    if max_frames is not None:
        expected = min(expected, max_frames)
    frames = np.empty((expected, *size, 3), dtype=np.uint8)
    count = 0
    for frame in iterate_frames(path, start=start, max_frames=max_frames, size=size):
        if count == len(frames):  # the header promised fewer frames than there are
            frames = np.concatenate([frames, np.empty_like(frames)])
        frames[count] = frame
        count += 1
    _check_count(info, count, start, max_frames, min_frames)
    return Video(frames[:count], info.fps if fps is None else float(fps))


class StreamedVideo:
    """The frames of a video on demand: `shape`, `dtype`, slices and iteration as of an array, few frames in memory.

    The frames are counted by decoding the video once, so that the count is exact and a damaged frame is found early.
    Slices in ascending order decode it once more in all.

    Args and errors: as `read_video`.

    Attributes:
        shape: (T, H, W, 3) of the frames as they are read.
        dtype: uint8.
        info: the file's own size and rate.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_frames: int | None = None,
        start: int = 0,
        max_side: int | None = None,
        min_frames: int = 2,
    ) -> None:
        self.info = probe_video(path)
        self._size = fit_size(self.info.height, self.info.width, max_side)
        self._start, self._max_frames = start, max_frames
        count = _count_frames(self.info.path, start, max_frames)
        _check_count(self.info, count, start, max_frames, min_frames)
        self.shape = (count, *self._size, 3)
        self._position = 0
        self._frames: Iterator[np.ndarray] = iter(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iterate_frames(self.info.path, start=self._start, max_frames=self._max_frames, size=self._size)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Consecutive frames, uint8 `[t, H, W, 3]`."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(f"a StreamedVideo gives slices of consecutive frames, not [{part!r}]; see read_video")
        first, end, _ = part.indices(len(self))
        if first < self._position:
            self._position, self._frames = 0, iter(self)
        frames = itertools.islice(self._frames, first - self._position, max(first, end) - self._position)
        chosen = list(frames)
        self._position = max(first, end)
        return np.stack(chosen) if chosen else np.empty((0, *self.shape[1:]), np.uint8)


def fit_size(height: int, width: int, max_side: int | None) -> tuple[int, int]:
    """(height, width) shrunk in proportion so that the longer side has at most `max_side` pixels; never enlarged."""
    if max_side is None:
        return height, width
    if max_side < 1:
        raise ValueError(f"max_side={max_side} was given; accepted is a number of pixels of 1 or more, or None")
    factor = min(1.0, max_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a frame, uint8 `[H, W, 3]`: averages areas when it shrinks, bicubic when it grows."""
    import av

    if frame.shape[:2] == (height, width):
        return frame
    shrinks = height * width < frame.shape[0] * frame.shape[1]
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(width, height, interpolation="AREA" if shrinks else "BICUBIC").to_ndarray()


def _count_frames(path: Path, start: int, max_frames: int | None) -> int:
    """Frames that `iterate_frames` gives; pictures of a folder are read, those of a file decoded but not converted."""
    if path.is_dir():
        return sum(1 for _ in iterate_frames(path, start=start, max_frames=max_frames))
    _check_part(start, max_frames)
    end = None if max_frames is None else start + max_frames
    with _open_container(path) as container:
        return sum(1 for _ in itertools.islice(_decode(container, path), start, end))


def _check_part(start: int, max_frames: int | None) -> None:
    if start < 0 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            f"start={start}, max_frames={max_frames}: start must be 0 or more, max_frames 1 or more (or None)"
        )


def _check_count(info: VideoInfo, count: int, start: int, max_frames: int | None, min_frames: int) -> None:
    """Refuse too few frames, and warn of a file that ends early."""
    promised = max(info.frames - start, 1) if max_frames is None else min(info.frames - start, max_frames)
    if info.path.is_file() and promised - count > 1:  # one may be cut off by an edit list
        warnings.warn(f"{info.path} promises {promised} frames and gives {count}; it seems to be cut off", stacklevel=3)
    if count < min_frames:
        part = "" if start == 0 and max_frames is None else f" from start={start} with max_frames={max_frames}"
        raise ValueError(
            f"{info.path} gives {count} frame{'' if count == 1 else 's'}{part}; at least {min_frames} are needed"
            + (", because tracking goes from one frame to another" if min_frames == 2 else "")
        )


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; {_ACCEPTED}")
    return path


def _open_container(path: Path) -> av.container.InputContainer:
    import av

    try:
        # only local containers of moving pictures: a playlist could open other files, a text file decodes as a terminal
        container = av.open(str(path.absolute()), options={"format_whitelist": _CONTAINER_FORMATS})
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
        if path.suffix.lower() in _PICTURE_SUFFIXES:
            raise ValueError(f"{path} is a single picture, one frame; at least 2 are needed; {_ACCEPTED}") from error
        raise ValueError(f"{path} is not a video that can be read, or it is damaged; {_ACCEPTED}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} holds no moving picture (sound only?); {_ACCEPTED}")
    return container


def _count_packets(path: Path) -> int:
    """Number of coded pictures, for containers whose header does not say (gif, webm); nothing is decoded."""
    with _open_container(path) as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


def _decode(container: av.container.InputContainer, path: Path) -> Iterator[av.VideoFrame]:
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is damaged: frame {count} cannot be decoded; `start` and `max_frames` can read the sound part"
        ) from error


def _file_frames(path: Path, start: int, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    with _open_container(path) as container:
        for index, frame in enumerate(_decode(container, path)):
            if index < start:
                continue
            turns = frame.rotation // 90
            if size is None:
                size = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
            height, width = reversed(size) if turns % 2 else size
            if (frame.height, frame.width) == (height, width):
                pixels = frame.to_ndarray(format="rgb24")
            else:
                pixels = frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray()
            yield np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _frame_files(folder: Path) -> list[Path]:
    files = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    pictures = [entry for entry in files if entry.suffix.lower() in _PICTURE_SUFFIXES]
    if not pictures:
        raise ValueError(f"the folder {folder} holds no png or jpg frames ({len(files)} other files); {_ACCEPTED}")
    return sorted(pictures, key=_natural_order)


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


def _folder_frames(folder: Path, start: int, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    pictures = _frame_files(folder)
    first_shape = None
    for path in pictures[start:]:
        pixels = _read_picture(path)
        if first_shape is None:
            first_shape = pixels.shape
        elif pixels.shape != first_shape:
            height, width = first_shape[:2]
            raise ValueError(
                f"{path} has {pixels.shape[0]}x{pixels.shape[1]} pixels, the frames before it {height}x{width}; all"
                " frames of a folder must have one size"
            )
        if size not in (None, pixels.shape[:2]):
            assert size is not None
            pixels = resize_frame(pixels, *size)
        yield pixels
