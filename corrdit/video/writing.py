"""Writing videos frame by frame; a file appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from corrdit.files import refuse_broken_link
from corrdit.video.info import DEFAULT_FPS

if TYPE_CHECKING:
    from av.filter import Graph


class VideoWriter:
    """Write frames one after another; the file (or folder) appears under its name when the `with` block ends well.

    Args:
        path: name ending in .mp4 or .mov (H.264, yuv420p), .gif, or without ending for a folder of png frames.
        fps: frames per second.

    A frame of odd height or width gets one row or column repeated at its border in mp4 and mov, because yuv420p needs
    even sizes. After an exception, Ctrl-C included, nothing is left behind and an older file is untouched.

    The same frames give the same bytes.

    Raises:
        ValueError: unknown ending, bad rate, frames of different sizes, no frames, a folder that is not empty, a
            broken link.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float = DEFAULT_FPS) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in ("", ".mp4", ".mov", ".gif"):
            raise ValueError(
                f"cannot write a video named {self.path.name}: accepted endings are .mp4, .mov and .gif, or none for a"
                " folder of png frames"
            )
        if not (np.isfinite(fps) and fps > 0):
            raise ValueError(f"fps={fps} was given; accepted is a positive number of frames per second")
        if suffix == "" and self.path.is_dir() and any(self.path.iterdir()):
            raise ValueError(f"the folder {self.path} is not empty; give a new name or an empty folder for the frames")
        self.fps = float(fps)
        self.frames = 0
        self._suffix = suffix
        self._shape: tuple[int, ...] | None = None
        self._encoder: _StreamEncoder | None = None
        self._partial: Path | None = None

    def __enter__(self) -> VideoWriter:
        refuse_broken_link(self.path)
        if not self.path.parent.is_dir():
            raise ValueError(f"cannot write {self.path}: the folder {self.path.parent} does not exist")
        # a name may be as long as the file system takes, so that nothing can be added to it
        self._partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name[:40]}.", dir=self.path.parent))
        if self._suffix == "":
            (self._partial / "video").mkdir()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 `[H, W, 3]` in RGB."""
        if self._partial is None:
            raise ValueError("VideoWriter.write works inside `with VideoWriter(...) as writer:` only")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"a frame is {frame.dtype} {list(frame.shape)}; accepted is uint8 [H, W, 3]")
        if self._shape not in (None, frame.shape):
            raise ValueError(f"frame {self.frames} is {list(frame.shape)}, the ones before {list(self._shape or ())}")
        if self._suffix == "":
            import imageio.v3 as imageio

            imageio.imwrite(self._partial / "video" / f"{self.frames:05d}.png", frame, plugin="pillow")
        else:
            if self._encoder is None:
                self._encoder = _StreamEncoder(self._partial / "video", self._suffix[1:], frame.shape, self.fps)
            self._encoder.encode(np.ascontiguousarray(frame))
        self._shape = frame.shape
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        partial, self._partial = self._partial, None
        encoder, self._encoder = self._encoder, None
        assert partial is not None
        try:
            if encoder is not None:
                encoder.close(finish=error is None)
            if error is None:
                if self.frames == 0:
                    raise ValueError(f"no frames were given for {self.path}; a video needs at least one")
                os.replace(partial / "video", self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_video(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float = DEFAULT_FPS) -> None:
    """Write frames (uint8 `[T, H, W, 3]`, or any iterable of `[H, W, 3]`) to an mp4, mov or gif file or a folder.

    The kind follows the ending of `path`; see `VideoWriter` for endings, odd sizes and errors.
    """
    with VideoWriter(path, fps) as writer:
        for frame in frames:
            writer.write(frame)


class _StreamEncoder:
    """H.264 or gif through PyAV."""

    def __init__(self, path: Path, container_format: str, shape: tuple[int, ...], fps: float) -> None:
        import av

        self._gif = container_format == "gif"
        rate = Fraction(fps).limit_denominator(1001)
        options = {} if self._gif else {"movflags": "+faststart"}
        self._container = av.open(str(path), "w", format=container_format, options=options)
        height, width = shape[:2]
        stream = self._container.add_stream("gif" if self._gif else "libx264", rate=rate)
        if self._gif:
            stream.pix_fmt = "pal8"
            self._graph = _palette_graph(height, width, rate)
        else:
            height, width = height + height % 2, width + width % 2
            stream.pix_fmt = "yuv420p"
            # the macroblock tree reads memory that x264 has not written, and the bytes would be other ones every time
            stream.options = {"crf": "17", "preset": "medium", "mbtree": "0"}
            context = stream.codec_context
            # several threads make other bytes on a machine of other cores, and not the same ones every time
            context.thread_count = 1
            # BT.709, limited range, said in the file: players guess by size otherwise
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        stream.height, stream.width = height, width
        self._stream = stream
        self._count = 0

    def encode(self, frame: np.ndarray) -> None:
        import av

        if self._gif:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = self._count, 1 / self._stream.codec_context.framerate
            self._graph.push(picture)
            picture = self._graph.pull()
        else:
            odd = (frame.shape[0] % 2, frame.shape[1] % 2)
            if any(odd):
                frame = np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts, picture.time_base = self._count, 1 / self._stream.codec_context.framerate
        self._count += 1
        self._container.mux(self._stream.encode(picture))

    def close(self, finish: bool) -> None:
        if finish:
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()
        else:
            import av

            # the file is thrown away: what closing it may complain about must not hide why it is
            with contextlib.suppress(av.error.FFmpegError):
                self._container.close()


def _palette_graph(height: int, width: int, rate: Fraction) -> Graph:
    """Filter graph that gives each frame a palette of its own, so that gifs keep their colours without two passes."""
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split = graph.add("split")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=sierra2_4a")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph
