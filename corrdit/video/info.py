"""What is known of a video beside its frames, and what is accepted as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corrdit.display import animation_html

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg")
ACCEPTED = "accepted are mp4, mov, webm, mkv, avi and gif files and folders of png or jpg frames"
DEFAULT_FPS = 24.0  # of a folder of frames, which says nothing about its rate


@dataclass(frozen=True)
class VideoInfo:
    """What is known before decoding: displayed size in pixels, frames per second, estimated number of frames.

    Attributes:
        hdr: "PQ" or "HLG" for a video of high dynamic range, whose values are read as they stand; None for others.
        remarks: what reading the video warns of, one sentence each: high dynamic range, pictures in a folder of
            numbered frames that are none of them.
    """

    path: Path
    height: int
    width: int
    fps: float
    frames: int
    hdr: str | None = None
    remarks: tuple[str, ...] = ()


class Moment(NamedTuple):
    """What is known of a frame beside its pixels: its number in the file, when it is shown in seconds, and whether the
    decoder calls it corrupt."""

    number: int
    seconds: float
    corrupt: bool = False


@dataclass(frozen=True, repr=False)
class Video:
    """A video in memory.

    Attributes:
        frames: uint8 `[T, H, W, 3]` in RGB.
        fps: frames per second, the mean where the rate varies.
        times: float64 `[T]`, when each frame is shown, in seconds of the file's own time.
        info: of the file.
    """

    frames: np.ndarray
    fps: float
    times: np.ndarray
    info: VideoInfo

    def __repr__(self) -> str:
        frames, height, width = self.frames.shape[:3]
        return f"Video({frames} frames of {height} x {width}, {self.fps:g} a second, {self.info.path.name})"

    def _repr_html_(self) -> str:
        return animation_html(self.frames, self.fps, repr(self))
