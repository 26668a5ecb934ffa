"""Reading videos frame by frame: container files through PyAV, folders of frames through imageio."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from corrdit.files import refuse_address
from corrdit.video.containers import file_frames, file_info
from corrdit.video.folders import folder_frames, folder_info
from corrdit.video.info import ACCEPTED, Moment, Video, VideoInfo

MOST_NAMED = 10
"""Corrupt frames that a message names."""


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, rate and estimated length of a video file or folder of frames.

    Raises:
        ValueError: nothing is at `path`, or it is not a video.
    """
    path = _existing(path)
    return folder_info(path) if path.is_dir() else file_info(path)


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
    info = probe_video(path)
    _warn_of(info.remarks)
    for moment, pixels in _frames(info, start, max_frames):
        if moment.corrupt:
            _warn_of([f"{info.path}: the decoder calls frame {moment.number} corrupt"])
        yield pixels(size or (info.height, info.width))


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
        fps: frames per second to report instead of the file's own (24 for folders); times follow it.
        min_frames: fewest frames accepted; the default is 2 because tracking needs two.

    Returns:
        `Video` with frames uint8 `[T, H, W, 3]`, as players show the file's default stream: turned and mirrored as it
        says, with square pixels. Warns of high dynamic range, of a file that is cut off and of frames that the decoder
        calls corrupt.

    Raises:
        ValueError: nothing at `path`, not a video, damaged, shown at an angle that is no quarter turn, too few frames,
            all of them corrupt, frames of different sizes in a folder, or a folder of videos and pictures.
    """
    info = probe_video(path)
    size = fit_size(info.height, info.width, max_side)
    expected = max(info.frames - start, 1)
    if max_frames is not None:
        expected = min(expected, max_frames)
    frames = np.empty((expected, *size, 3), dtype=np.uint8)
    read: list[Moment] = []
    for moment, pixels in _frames(info, start, max_frames):
        if len(read) == len(frames):  # the header promised fewer frames than there are
            frames = np.concatenate([frames, np.empty_like(frames)])
        frames[len(read)] = pixels(size)
        read.append(moment)
    _check_read(info, read, start, max_frames, min_frames)
    times = np.array([moment.seconds for moment in read])
    if fps is not None:
        times = (start + np.arange(len(read))) / float(fps)
    return Video(frames[: len(read)], info.fps if fps is None else float(fps), times, info)


class StreamedVideo:
    """The frames of a video on demand: `shape`, `dtype`, slices and iteration as of an array, few frames in memory.

    The frames are counted by decoding the video once, so that the count is exact and a damaged frame is found early.
    Slices in ascending order decode it once more in all.

    Args and errors: as `read_video`.

    Attributes:
        shape: (T, H, W, 3) of the frames as they are read.
        dtype: uint8.
        times: float64 `[T]`, when each frame is shown, in seconds of the file's own time.
        info: the file's own size and rate.
        part: (start, max_frames) that were asked for.
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
        self.part = (start, max_frames)
        read = [moment for moment, _ in _frames(self.info, start, max_frames)]
        _check_read(self.info, read, start, max_frames, min_frames)
        self.times = np.array([moment.seconds for moment in read])
        self.shape = (len(read), *fit_size(self.info.height, self.info.width, max_side), 3)
        self._position = 0
        self._frames: Iterator[np.ndarray] = iter(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.at_size(*self.shape[1:3])

    def at_size(self, height: int, width: int) -> Iterator[np.ndarray]:
        """The frames once more from the first on, uint8 `[height, width, 3]`, one at a time."""
        for _, pixels in _frames(self.info, *self.part):
            yield pixels((height, width))

    def __getitem__(self, part: slice) -> np.ndarray:
        """Consecutive frames, uint8 `[t, H, W, 3]`."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise ValueError(f"a StreamedVideo gives slices of consecutive frames, not [{part!r}]; see read_video")
        first, end, _ = part.indices(len(self))
        if first < self._position:
            self._position, self._frames = 0, iter(self)
        end = max(first, end)
        chosen = np.empty((end - first, *self.shape[1:]), np.uint8)
        wanted = itertools.islice(self._frames, first - self._position, end - self._position)
        for place, frame in enumerate(wanted):
            chosen[place] = frame
        self._position = end
        return chosen


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


def _frames(
    info: VideoInfo, start: int, max_frames: int | None
) -> Iterator[tuple[Moment, Callable[[tuple[int, int]], np.ndarray]]]:
    """Decoded frames of a file or folder, each with what converts it to uint8 `[H, W, 3]` of a (height, width).

    Nothing is warned of.
    """
    _check_part(start, max_frames)
    end = None if max_frames is None else start + max_frames
    if info.path.is_dir():
        pictures = itertools.islice(folder_frames(info.path, start), max_frames)
        for number, picture in enumerate(pictures, start=start):
            yield Moment(number, number / info.fps), functools.partial(_resized, picture)
        return
    for frame in itertools.islice(file_frames(info.path), start, end):
        yield frame.moment, frame.pixels


def _resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return resize_frame(frame, *size)


def _check_part(start: int, max_frames: int | None) -> None:
    if start < 0 or (max_frames is not None and max_frames < 1):
        raise ValueError(
            f"start={start}, max_frames={max_frames}: start must be 0 or more, max_frames 1 or more (or None)"
        )


def _check_read(info: VideoInfo, read: list[Moment], start: int, max_frames: int | None, min_frames: int) -> None:
    """Refuse too few frames, and warn of what is wrong with the file."""
    count = len(read)
    corrupt = [moment.number for moment in read if moment.corrupt]
    promised = max(info.frames - start, 1) if max_frames is None else min(info.frames - start, max_frames)
    said = list(info.remarks)
    if info.path.is_file() and promised - count > 1:
        said.append(f"{info.path} promises {promised} frames and gives {count}; it seems to be cut off")
    if count < min_frames:
        part = "" if start == 0 and max_frames is None else f" from start={start} with max_frames={max_frames}"
        raise ValueError(
            f"{info.path} gives {count} frame{'' if count == 1 else 's'}{part}; at least {min_frames} are needed"
            + (", because tracking goes from one frame to another" if min_frames == 2 else "")
        )
    if corrupt and len(corrupt) == count:
        raise ValueError(f"{info.path} is damaged: the decoder calls all of its {count} frames corrupt")
    if corrupt:
        names = ", ".join(map(str, corrupt[:MOST_NAMED])) + (", ..." if len(corrupt) > MOST_NAMED else "")
        said.append(f"{info.path}: the decoder calls {len(corrupt)} of {count} frames corrupt: {names}")
    _warn_of(said, stacklevel=4)


def _warn_of(sentences: Iterable[str], stacklevel: int = 3) -> None:
    for sentence in sentences:
        warnings.warn(sentence, UserWarning, stacklevel=stacklevel)


def _existing(path: str | os.PathLike[str]) -> Path:
    refuse_address(path)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; {ACCEPTED}")
    return path
