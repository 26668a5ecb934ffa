"""Container files through PyAV: the stream that players show, its frames upright with square pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from corrdit.video.info import ACCEPTED, DEFAULT_FPS, FRAME_SUFFIXES, Moment, VideoInfo

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

_CONTAINER_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
"""Transfer characteristics of ITU-T H.273."""
LARGEST_ASPECT = 16
"""Pixels further from squares than this are a mistake in the file."""
LARGEST_TILT = math.sin(math.radians(1)) + 2**-15
"""Sine of a degree, and the rounding of a matrix's entries."""
UPRIGHT = np.eye(2, dtype=int)


class FileFrame(NamedTuple):
    """A decoded frame, its display matrix (see `_turned`) and the width of its pixels over their height."""

    moment: Moment
    picture: av.VideoFrame
    turned: np.ndarray
    aspect: Fraction

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in square pixels, upright; sides grow for that and never shrink."""
        height, width = self.picture.height, self.picture.width
        if self.aspect >= 1:
            width = round(width * self.aspect)
        else:
            height = round(height / self.aspect)
        return (width, height) if self.turned[0, 1] else (height, width)

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """uint8 `[H, W, 3]` in RGB, upright, at (height, width) `size`."""
        picture, transposed = self.picture, bool(self.turned[0, 1])
        height, width = reversed(size) if transposed else size
        if (picture.height, picture.width) == (height, width):
            pixels = picture.to_ndarray(format="rgb24")
        else:
            shrinks = height * width < picture.height * picture.width
            way = "AREA" if shrinks else "BICUBIC"
            pixels = picture.reformat(width, height, "rgb24", interpolation=way).to_ndarray()
        if transposed:
            pixels = pixels.swapaxes(0, 1)
        right, down = self.turned.sum(1)  # the side each axis of the shown picture runs to
        return np.ascontiguousarray(pixels[:: int(down), :: int(right)])


def file_info(path: Path) -> VideoInfo:
    """Size, rate, estimated length and transfer of a video file; its first frame is decoded."""
    with _open_container(path) as container:
        stream = _shown_stream(container, path)
        fps = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
        frames = _promised_frames(container, stream)
        first = next(_decoded(container, stream, path), None)
        if first is None:
            raise ValueError(f"{path} holds no frames that can be decoded; {ACCEPTED}")
        # The frame knows what the container leaves out.
        hdr = _HDR_TRANSFERS.get(int(first.picture.color_trc)) or _HDR_TRANSFERS.get(stream.codec_context.color_trc)
    remarks = []
    if hdr is not None:
        remarks.append(
            f"{path} is a video of high dynamic range ({hdr}); its values are read as if they were of standard range,"
            " so colours look pale; convert it first where they matter"
        )
    height, width = first.size
    return VideoInfo(path, height, width, fps, frames or _count_packets(path), hdr, tuple(remarks))


def file_frames(path: Path) -> Iterator[FileFrame]:
    """The frames of a file, decoded and not yet converted.

    Raises:
        ValueError: not a video, damaged beyond decoding, or shown at an angle.
    """
    with _open_container(path) as container:
        yield from _decoded(container, _shown_stream(container, path), path)


def _open_container(path: Path) -> av.container.InputContainer:
    import av

    try:
        # only local containers of moving pictures: a playlist could open other files, a text file decodes as a terminal
        container = av.open(str(path.absolute()), options={"format_whitelist": _CONTAINER_FORMATS})
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise ValueError(f"{path} cannot be opened: {error.strerror}") from error
        if path.suffix.lower() in FRAME_SUFFIXES:
            raise ValueError(f"{path} is a single picture, one frame; at least 2 are needed; {ACCEPTED}") from error
        raise ValueError(f"{path} is not a video that can be read, or it is damaged; {ACCEPTED}") from error
    return container


def _shown_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    """The stream that is marked as the default, else the first; covers and thumbnails are no moving pictures."""
    from av.stream import Disposition

    pictures = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise ValueError(f"{path} holds no moving picture (sound only?); {ACCEPTED}")
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _promised_frames(container: av.container.InputContainer, stream: VideoStream) -> int:
    """Frames that the header promises, 0 where it does not say. What an edit list leaves out is not promised."""
    if stream.frames and "mp4" in container.format.name:  # other indices hold key frames only
        return sum(not entry.is_discard for entry in stream.index_entries) or stream.frames
    return stream.frames


def _count_packets(path: Path) -> int:
    """Number of coded pictures, for containers whose header does not say (gif, webm); nothing is decoded."""
    with _open_container(path) as container:
        packets = container.demux(_shown_stream(container, path))
        return sum(1 for packet in packets if packet.size and not packet.is_discard)


def _decoded(container: av.container.InputContainer, stream: VideoStream, path: Path) -> Iterator[FileFrame]:
    import av

    # Threads hand frames on before it is known whether they are corrupt, or do not look.
    stream.thread_type = "NONE"
    aspect = _pixel_aspect(stream, path)
    rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
    count = 0
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.FFmpegError:
                if not packet.is_corrupt:
                    raise
                frames = []  # the file ends within this packet; that it is cut off shows in the number of frames
            for frame in frames:
                seconds = count / rate if frame.time is None else frame.time
                yield FileFrame(Moment(count, seconds, frame.is_corrupt), frame, _turned(frame, path), aspect)
                count += 1
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path} is damaged: frame {count} cannot be decoded; `start` and `max_frames` can read the sound part"
        ) from error


def _pixel_aspect(stream: VideoStream, path: Path) -> Fraction:
    """Width of a pixel over its height."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, LARGEST_ASPECT) <= aspect <= LARGEST_ASPECT:
        raise ValueError(
            f"{path} says that its pixels are {aspect.numerator} wide and {aspect.denominator} high (sample aspect"
            f" ratio); accepted is up to {LARGEST_ASPECT} to 1; write the file anew with the right ratio"
        )
    return aspect


def _turned(frame: av.VideoFrame, path: Path) -> np.ndarray:
    """How players show the frame, by its display matrix: `[2, 2]` of 0, 1 and -1, from (x, y) as stored to shown ones.

    Row 0 is the shown x: [1, 0] as stored, [0, -1] for a quarter turn clockwise.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT
    # a, b, u, c, d, v, x, y, w: a pixel (x, y) is shown at (a x + c y, b x + d y)
    values = np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2].T.astype(float)
    if not values.any():
        return UPRIGHT
    lengths = np.linalg.norm(values, axis=0)  # players take the turn and leave the scale
    unit = values / np.where(lengths > 0, lengths, 1)
    nearest = np.round(unit).astype(int)
    tilt = np.abs(unit - nearest)
    if (np.abs(nearest).sum(0) != 1).any() or (np.abs(nearest).sum(1) != 1).any() or tilt.max() > LARGEST_TILT:
        angle = math.degrees(math.atan2(values[1, 0], values[0, 0]))
        raise ValueError(
            f"{path} is shown turned by {angle:.1f} degrees or sheared (a, b, c, d of its display matrix are"
            f" {values.T.ravel().astype(int).tolist()}); accepted are quarter turns, mirrored or not, to within one"
            " degree; turn the frames and write the file anew"
        )
    return nearest
