"""Videos with truth for an analysis: the generated world, folders with tracks beside, TAP-Vid and DiffTrack's sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corrdit.analysis.dataset import read_difftrack
from corrdit.analysis.pseudo_truth import Tracker
from corrdit.array_files import read_arrays

HELD_OUT_SEEDS = 2_000_000_000
"""Seeds from here on are used neither by training nor by the evaluation of checkpoints."""


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
    """

    name: str
    load: Callable[[], AnalysisVideo]
    truth: str


def world_items(
    count: int, *, seed: int = 0, frames: int = 8, height: int = 64, width: int = 96, points: int = 16
) -> list[AnalysisItem]:
    """Generated videos with exact tracks of `points` x `points` places on the first frame.

    Raises:
        ValueError: no videos or points, or a size the world does not make.
    """
    from corrdit.integrations.embedded.world import WorldConfig, generate

    if count < 1 or points < 1:
        raise ValueError(f"{count} videos with {points} x {points} points were asked for; at least 1 of each is needed")
    config = WorldConfig(frames, height, width)
    queries = point_grid(points, height, width)

    def load(number: int) -> AnalysisVideo:
        clip = generate([HELD_OUT_SEEDS + 100_000 * seed + number], config)[0]
        truth = clip.tracks(queries)
        return AnalysisVideo(clip.video, truth.xy, truth.visible, clip.prompt)

    return [
        AnalysisItem(f"{number:04d}", lambda number=number: load(number), "exact")  # type: ignore[misc]
        for number in range(count)
    ]


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
    from corrdit.tracking.files import find_videos

    root, given = Path(folder), Path(folder if tracks is None else tracks)
    items = []
    for name in find_videos(root, without=without):
        stem = name if (root / name).is_dir() else str(Path(name).with_suffix(""))
        candidates = (given / f"{stem}.npz", given / name / "tracks.npz", given / stem / "tracks.npz")
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is not None:
            load = _given(root / name, file)
        else:
            load = _tracked(root / name, tracker, points)
        items.append(AnalysisItem(name, load, "given tracks" if file is not None else tracker_name))
    return items


def tapvid_items(
    path: str | os.PathLike[str], *, on_broken: Callable[[str, ValueError], None] | None = None
) -> Iterator[AnalysisItem]:
    """The videos of a TAP-Vid file or folder of shards, with the points visible in the first frame; read as they come.

    Arguments and errors: as `corrdit.data.read_tapvid`.
    """
    from corrdit.data import TapVidVideo, read_tapvid

    def load(video: TapVidVideo) -> AnalysisVideo:
        sample = video.sample("frame_0")
        return AnalysisVideo(sample.video, sample.tracks.transpose(1, 0, 2), ~sample.occluded.T)

    for video in read_tapvid(path, on_broken=on_broken):
        yield AnalysisItem(video.name, lambda video=video: load(video), "annotated")  # type: ignore[misc]


def difftrack_items(folder: str | os.PathLike[str]) -> list[AnalysisItem]:
    """The videos of a set in DiffTrack's layout, with its pseudo-tracks.

    Raises:
        ValueError: as `read_difftrack`.
    """
    items = []
    for entry in read_difftrack(folder):

        def load(entry=entry) -> AnalysisVideo:  # type: ignore[no-untyped-def]
            from corrdit.video import read_video

            xy, visible = entry.load_tracks()
            return AnalysisVideo(read_video(entry.video).frames, xy, visible, entry.prompt)

        items.append(AnalysisItem(entry.name, load, "given tracks"))
    return items


def point_grid(count: int, height: int, width: int) -> np.ndarray:
    """`count` x `count` points at the centres of equal cells of frame 0: float32 `[count**2, 3]`, (frame, x, y)."""
    share = (np.arange(count) + 0.5) / count
    y, x = np.meshgrid(share * height, share * width, indexing="ij")
    return np.stack((np.zeros_like(x), x, y), axis=-1).reshape(-1, 3).astype(np.float32)


def _given(video: Path, tracks: Path) -> Callable[[], AnalysisVideo]:
    def load() -> AnalysisVideo:
        from corrdit.video import read_video

        what = "a tracks file (.npz with xy and visible)"
        found = read_arrays(tracks, ("xy", "visible"), what=what, optional=("video",))
        frames = found["video"] if "video" in found else read_video(video).frames
        return AnalysisVideo(frames, found["xy"], found["visible"])

    return load


def _tracked(video: Path, tracker: Tracker | None, points: int) -> Callable[[], AnalysisVideo]:
    def load() -> AnalysisVideo:
        from corrdit.video import read_video

        if tracker is None:
            raise ValueError(f"{video} has no tracks beside it and no tracker was given; give one of the two")
        frames = read_video(video).frames
        tracks = tracker(frames, point_grid(points, *frames.shape[1:3]))
        return AnalysisVideo(frames, tracks.xy.numpy(), tracks.visible.numpy())

    return load
