"""Videos with truth for an analysis: folders with tracks beside, TAP-Vid and DiffTrack's sets."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corrdit.analysis.dataset import DiffTrackEntry, read_difftrack
from corrdit.array_files import content_digest, read_arrays
from corrdit.data import TapVidVideo, read_tapvid
from corrdit.files import file_digest
from corrdit.runs import Inputs
from corrdit.tracking.files import find_videos
from corrdit.tracking.pseudo_truth import Tracker
from corrdit.tracking.queries import grid_points
from corrdit.video import read_video


@dataclass(frozen=True, eq=False)
class AnalysisVideo:
    """A video and where points go in it.

    Args:
        video: uint8 `[T, H, W, 3]`.
        xy: float `[T, P, 2]`, (x, y) in pixels.
        visible: bool `[T, P]`.
        prompt: what it shows; empty where that is not known.
    """

    video: np.ndarray
    xy: np.ndarray
    visible: np.ndarray
    prompt: str = ""


class AnalysisItem(NamedTuple):
    """A video to be analysed, loaded when its turn comes.

    Args:
        name: of its results.
        load: reads the video and its truth; ValueError or OSError where that fails.
        truth: what the truth is, in a few words.
        inputs: gives digests of what is loaded, by which a result of something else is known.
    """

    name: str
    load: Callable[[], AnalysisVideo]
    truth: str
    inputs: Callable[[], Inputs] = dict


def folder_items(
    folder: str | os.PathLike[str],
    *,
    tracks: str | os.PathLike[str] | None = None,
    tracker: Tracker | None = None,
    tracker_name: str = "a tracker",
    points: int = 16,
    without: str | os.PathLike[str] | None = None,
) -> list[AnalysisItem]:
    """The videos of a folder, each with given tracks or those of a tracker.

    Given tracks of a video NAME.mp4 are NAME.npz beside it or in the folder `tracks` (also NAME.mp4/tracks.npz there,
    as `corrdit track` writes), with xy `[T, P, 2]` and visible `[T, P]`; where such a file also holds `video`, as those
    of `corrdit world` do, its exact frames are taken.

    Args:
        folder: looked through with its subfolders.
        tracks: folder with tracks under the names of the videos; None looks beside the videos.
        tracker: gives pseudo-truth for videos without given tracks; None has them fail.
        tracker_name: for the report.
        points: a side of the tracker's grid on the first frame.
        without: a folder to pass over, such as one for results.

    Raises:
        ValueError: not a folder, or one without videos.
    """
    root, given = Path(folder), Path(folder if tracks is None else tracks)
    items = []
    for name in find_videos(root, without=without):
        stem = name if (root / name).is_dir() else str(Path(name).with_suffix(""))
        candidates = (given / f"{stem}.npz", given / name / "tracks.npz", given / stem / "tracks.npz")
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is not None:
            load, truth = functools.partial(_with_given_tracks, root / name, file), "given tracks"
        else:
            load, truth = functools.partial(_tracked, root / name, tracker, points), tracker_name
        items.append(AnalysisItem(name, load, truth, _digests(video=root / name, tracks=file)))
    return items


def tapvid_items(
    path: str | os.PathLike[str], *, on_broken: Callable[[str, ValueError], None] | None = None
) -> Iterator[AnalysisItem]:
    """The videos of a TAP-Vid file or folder of shards, with the points visible in the first frame; read as they come.

    Arguments and errors: as `corrdit.data.read_tapvid`.
    """

    def load(video: TapVidVideo) -> AnalysisVideo:
        sample = video.sample("frame_0")
        return AnalysisVideo(sample.video, sample.tracks.transpose(1, 0, 2), ~sample.occluded.T)

    for video in read_tapvid(path, on_broken=on_broken):
        inputs = {"video": content_digest(video.video, video.points, video.occluded)}
        yield AnalysisItem(video.name, functools.partial(load, video), "annotated", inputs.copy)


def difftrack_items(folder: str | os.PathLike[str]) -> list[AnalysisItem]:
    """The videos of a set in DiffTrack's layout, with its pseudo-tracks.

    Raises:
        ValueError: as `read_difftrack`.
    """

    def load(entry: DiffTrackEntry) -> AnalysisVideo:
        xy, visible = entry.load_tracks()
        return AnalysisVideo(read_video(entry.video).frames, xy, visible, entry.prompt)

    return [
        AnalysisItem(
            entry.name,
            functools.partial(load, entry),
            "given tracks",
            _digests(video=entry.video, tracks=entry.tracks, visibility=entry.visibility),
        )
        for entry in read_difftrack(folder)
    ]


def _digests(**files: Path | None) -> Callable[[], Inputs]:
    """Digests of files by words for them, when they are asked for."""
    return lambda: {word: file_digest(file) for word, file in files.items() if file is not None}


def _with_given_tracks(video: Path, tracks: Path) -> AnalysisVideo:
    what = "a tracks file (.npz with xy and visible)"
    found = read_arrays(tracks, ("xy", "visible"), what=what, optional=("video",))
    frames = found["video"] if "video" in found else read_video(video).frames
    return AnalysisVideo(frames, found["xy"], found["visible"])


def _tracked(video: Path, tracker: Tracker | None, points: int) -> AnalysisVideo:
    if tracker is None:
        raise ValueError(f"{video} has no tracks beside it and no tracker was given; give one of the two")
    frames = read_video(video).frames
    tracks = tracker(frames, grid_points(points, *frames.shape[1:3]))
    return AnalysisVideo(frames, tracks.xy.numpy(), tracks.visible.numpy())
