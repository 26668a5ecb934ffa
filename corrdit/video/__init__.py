"""Reading and writing videos: mp4, mov, webm, mkv, avi and gif files, and folders of frames.

Frames are uint8 `[H, W, 3]` in RGB, upright as a player shows them. Reading is streamed, so a long video can be read
at a reduced size without its full-size frames ever being held together; writing is streamed too, and a file appears
under its name only when it is complete.
"""

from corrdit.video.frames import as_frames
from corrdit.video.info import Video, VideoInfo
from corrdit.video.reading import (
    StreamedVideo,
    fit_size,
    iterate_frames,
    probe_video,
    read_video,
    resize_frame,
)
from corrdit.video.writing import VideoWriter, write_video

__all__ = [
    "StreamedVideo",
    "Video",
    "VideoInfo",
    "VideoWriter",
    "as_frames",
    "fit_size",
    "iterate_frames",
    "probe_video",
    "read_video",
    "resize_frame",
    "write_video",
]
