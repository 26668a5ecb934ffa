"""Follow points through a video by the attention of a video diffusion transformer.

reads   VIDEO: an mp4, mov, webm, mkv, avi or gif file, or a folder of png or jpg frames
        --points: grid:16 for 16 x 16 points on the first frame, or a CSV file with the columns frame,x,y
        (frame counts from 0 at the first frame read; x, y in pixels from the frame's top left corner; a first line
        with the names of the columns may be there or not)
writes  into the folder --output, all of them or none:
        tracks.npz  xy [frames, points, 2] in pixels, visible and score [frames, points], queries [points, 3]
        tracks.mp4  the video with dots and trails coloured by start position; points that are hidden are hollow
        tracks.png  a contact sheet of it
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from corrdit.cli.model_options import add_model_options, loaded_backbone
from corrdit.cli.output import OutputFolder
from corrdit.cli.points import check_points_spec, read_points
from corrdit.cli.progress import progress_bar
from corrdit.cli.tracker_options import add_tracker_options, given_tracker_options

HELP = "follow points through a video"
USAGE = "VIDEO --output DIR [--points grid:16 | FILE.csv] [--model embedded] [options]"


def add_arguments(parser: Any) -> None:
    parser.add_argument("video", metavar="VIDEO", help="video file, or folder of frames")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    parser.add_argument("--points", default="grid:16", metavar="grid:N|FILE.csv", help="the points to follow")
    parser.add_argument("--preset", choices=["default", "published"], default="default", help="tracker options at once")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N frames")
    parser.add_argument("--max-frames", type=int | None, default=None, metavar="N", help="read at most N frames")
    parser.add_argument(
        "--max-side",
        type=int,
        default=720,
        metavar="PIXELS",
        help="shrink frames to at most this many pixels on the longer side while reading; results stay in the file's"
        " own pixels",
    )
    parser.add_argument("--trail", type=int, default=16, metavar="N", help="frames of path drawn behind a point")
    add_tracker_options(parser)


def run(arguments: Any) -> int:
    from corrdit.video import StreamedVideo

    began = time.perf_counter()
    _refuse_folder_of_videos(Path(arguments.video))
    check_points_spec(arguments.points)
    video = StreamedVideo(
        arguments.video,
        start=arguments.start,
        max_frames=arguments.max_frames,
        max_side=arguments.max_side,
    )
    height, width = video.info.height, video.info.width
    queries = read_points(arguments.points, frames=len(video), height=height, width=width)
    with OutputFolder(arguments.output) as folder:
        tracks = _track(arguments, video, queries)
        tracks.save(folder / "tracks.npz", queries=queries)
        _draw(arguments, folder, tracks, queries, video)
    visible = 100 * float(np.asarray(tracks.visible).mean())
    print(
        f"{len(queries)} points through {len(video)} frames of {height} x {width} in"
        f" {time.perf_counter() - began:.1f} s; visible {visible:.0f} %"
    )
    for name in ("tracks.npz", "tracks.mp4", "tracks.png"):
        print(f"  {Path(arguments.output) / name}")
    return 0


def _refuse_folder_of_videos(path: Path) -> None:
    if not path.is_dir():
        return
    videos = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in (".mp4", ".mov", ".webm", ".gif"))
    pictures = any(entry.suffix.lower() in (".png", ".jpg", ".jpeg") for entry in path.iterdir())
    if videos and not pictures:
        raise ValueError(
            f"the folder {path} holds {len(videos)} videos ({videos[0]} ...); give one of them, or a folder of frames"
        )


def _track(arguments: Any, video: Any, queries: np.ndarray) -> Any:
    """Tracks in the file's own pixels; the tracker sees the frames at the size they are read."""
    from corrdit import PointTracker

    backbone = loaded_backbone(arguments)
    tracker = PointTracker(backbone, preset=arguments.preset, **given_tracker_options(arguments))
    with progress_bar("tracking") as report:
        return track_at_size(tracker, video, queries, (video.info.height, video.info.width), progress=report)


def track_at_size(tracker: Any, video: Any, queries: np.ndarray, size: tuple[int, int], *, progress: Any = None) -> Any:
    """Track points given in pixels of `size` (height, width) through a video that may have been shrunk while read."""
    from corrdit import Tracks

    if tuple(video.shape[1:3]) == size:
        return tracker.track(video, queries, progress=progress)
    extent = np.array([video.shape[2], video.shape[1]], dtype=np.float32)
    factor = extent / np.array(size[::-1], dtype=np.float32)
    shrunk = queries.copy()
    shrunk[:, 1:] = np.minimum(queries[:, 1:] * factor, extent)
    tracks = tracker.track(video, shrunk, progress=progress)
    xy = np.asarray(tracks.xy) / factor
    xy[queries[:, 0].astype(int), np.arange(len(queries))] = queries[:, 1:]
    return Tracks(xy=xy, visible=tracks.visible, score=tracks.score)


def _draw(arguments: Any, folder: Path, tracks: Any, queries: np.ndarray, video: Any) -> None:
    from corrdit.video import iterate_frames
    from corrdit.visualization import TrackStyle, write_track_pictures

    frames = iterate_frames(arguments.video, start=arguments.start, max_frames=arguments.max_frames)
    with progress_bar("drawing") as report:
        write_track_pictures(
            frames,
            tracks,
            (video.info.height, video.info.width),
            queries=queries,
            fps=video.info.fps,
            video_path=folder / "tracks.mp4",
            sheet_path=folder / "tracks.png",
            style=TrackStyle(trail=arguments.trail),
            progress=report,
        )
