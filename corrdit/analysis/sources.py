"""Videos with truth for an analysis: folders with tracks beside, TAP-Vid and DiffTrack's sets."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from corrdit.analysis.dataset import PROMPTS_FILE, DiffTrackEntry, read_difftrack, set_prompts
from corrdit.arguments import choice, whole_number
from corrdit.array_files import content_digest, read_arrays
from corrdit.data import TapVidVideo, read_tapvid
from corrdit.files import file_digest
from corrdit.runs import Inputs, Keywords
from corrdit.tracking.files import find_videos
from corrdit.tracking.pseudo_truth import STARTING_GRIDS, Tracker, starting_grid_of
from corrdit.tracking.queries import grid_points
from corrdit.video import read_video

RELEASED_SEED = 42
RELEASED_SIZE: Keywords = {"height": 480, "width": 720}
"""Of every generated video of DiffTrack's sets."""


@dataclass(frozen=True, eq=False)
class AnalysisVideo:
    """A video and where points go in it.

    Args:
        video: uint8 `[T, H, W, 3]`.
        xy: float `[T, P, 2]`, (x, y) in pixels.
        visible: bool `[T, P]`.
        prompt: what it shows; empty where that is not known.
        starts: float `[P, 2]`, the queries in place of the positions in frame 0.
    """

    video: np.ndarray
    xy: np.ndarray
    visible: np.ndarray
    prompt: str = ""
    starts: np.ndarray | None = None


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


class GeneratedItem(NamedTuple):
    """A video to be generated, whose denoising is analysed.

    Args:
        name: of its results.
        number: of the video in its set.
        prompts: of the whole set; this one's is that of its number.
        seed: of the noise.
        truth: what the truth is, in a few words.
        inputs: as of an `AnalysisItem`.
        tracks: gives xy `[T, P, 2]` and visible `[T, P]`; ValueError where that fails. None takes the tracker's.
        tracker: gives the pseudo-truth from the video.
        mode: starting grid of the tracker, "object" or "scene".
        image: for image-to-video models.
        call: further arguments of the pipeline's call.
    """

    name: str
    number: int
    prompts: tuple[str, ...]
    seed: int
    truth: str
    inputs: Callable[[], Inputs] = dict
    tracks: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    tracker: Tracker | None = None
    mode: str = "scene"
    image: Path | None = None
    call: Keywords | None = None

    @property
    def prompt(self) -> str:
        """What the video is to show."""
        return self.prompts[self.number]


Item: TypeAlias = "AnalysisItem | GeneratedItem"


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
    path: str | os.PathLike[str],
    *,
    on_broken: Callable[[str, ValueError], None] | None = None,
    incomplete: bool = False,
    first_frames: int | None = None,
) -> Iterator[AnalysisItem]:
    """The videos of a TAP-Vid file or folder of shards, with the points visible in the first frame; read as they come.

    Args:
        path, on_broken, incomplete: as `corrdit.data.read_tapvid`.
        first_frames: cut videos after so many frames and leave shorter ones out, with a warning (DiffTrack's released
            analysis: 49). None takes all frames of all videos.

    Raises:
        FileNotFoundError, ValueError: as `corrdit.data.read_tapvid`.
    """
    least = 1 if first_frames is None else whole_number("first_frames", first_frames, 2)

    def load(video: TapVidVideo) -> AnalysisVideo:
        sample = video.sample("frame_0")
        return AnalysisVideo(sample.video, sample.tracks.transpose(1, 0, 2), ~sample.occluded.T)

    for video in read_tapvid(path, on_broken=on_broken, incomplete=incomplete):
        if len(video.video) < least:
            warnings.warn(f"{video.name} has {len(video.video)} frames of {least} and is left out", stacklevel=2)
            continue
        video = video if first_frames is None else video.shortened(first_frames)
        inputs = {"video": content_digest(video.video, video.points, video.occluded)}
        yield AnalysisItem(video.name, functools.partial(load, video), "annotated", inputs.copy)


def difftrack_items(folder: str | os.PathLike[str]) -> list[AnalysisItem]:
    """The videos of a set in DiffTrack's layout, with its pseudo-tracks.

    Raises:
        ValueError: as `read_difftrack`.
    """

    def load(entry: DiffTrackEntry) -> AnalysisVideo:
        xy, visible = entry.load_tracks()
        video = read_video(entry.video).frames
        starts = starting_grid_of(xy[0], visible[0], *video.shape[1:3])
        return AnalysisVideo(video, xy, visible, entry.prompt, starts)

    return [
        AnalysisItem(
            entry.name,
            functools.partial(load, entry),
            "given tracks",
            _digests(video=entry.video, tracks=entry.tracks, visibility=entry.visibility),
        )
        for entry in read_difftrack(folder)
    ]


def without_videos(folder: str | os.PathLike[str]) -> bool:
    """Whether a set in DiffTrack's layout has no video at all, as the released ones, and is to be generated again.

    Raises:
        ValueError: as `read_difftrack`.
    """
    return not any(entry.video.exists() for entry in read_difftrack(folder))


def regenerated_items(
    folder: str | os.PathLike[str], *, seed: int = RELEASED_SEED, call: Keywords | None = None
) -> list[GeneratedItem]:
    """The videos of a released set, to be generated from its prompts (and images) and scored against its tracks.

    Args:
        folder: of the set.
        seed: of every video, as released.
        call: further arguments of the pipeline's call; 480 x 720 pixels and as many frames as there are tracks unless
            it says otherwise.

    Raises:
        ValueError: as `read_difftrack`, or a set without prompts.
    """
    prompts = set_prompts(folder)
    if not prompts:
        raise ValueError(f"{folder} has neither videos nor a {PROMPTS_FILE} to generate them from; add one of the two")
    return [
        GeneratedItem(
            name=entry.name,
            number=entry.number,
            prompts=tuple(prompts),
            seed=seed,
            truth="given tracks",
            inputs=_digests(
                {"prompt": content_digest(entry.prompt)},
                tracks=entry.tracks,
                visibility=entry.visibility,
                image=entry.image,
            ),
            tracks=entry.load_tracks,
            image=entry.image,
            call={**RELEASED_SIZE, **(call or {})},
        )
        for entry in read_difftrack(folder)
    ]


def prompt_items(
    prompts: Sequence[str],
    *,
    tracker: Tracker,
    tracker_name: str = "a tracker",
    mode: str = "scene",
    seed: int = 0,
    same_seed: bool = False,
    images: str | os.PathLike[str] | None = None,
    call: Keywords | None = None,
) -> list[GeneratedItem]:
    """Videos to be generated from prompts, where a tracker stands in for the truth.

    Args:
        prompts: one for each video.
        tracker: gives the pseudo-truth, see `corrdit.tracking.pseudo_truth`.
        tracker_name: for the report.
        mode: starting grid, "object" or "scene".
        seed: of the first video; the others have those after it.
        same_seed: whether all have the first one's, as DiffTrack's released code.
        images: for image-to-video models: an image for all, or a folder with 000.png, 001.png, ... for each.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: an unknown mode, or a folder that lacks the image of a video.
    """
    choice("mode", mode, STARTING_GRIDS)
    return [
        GeneratedItem(
            name=f"{number:03}",
            number=number,
            prompts=tuple(prompts),
            seed=seed if same_seed else seed + number,
            truth=tracker_name,
            inputs=_digests({"prompt": content_digest(prompt)}, image=(image := _image(images, number))),
            tracker=tracker,
            mode=mode,
            image=image,
            call=dict(call or {}),
        )
        for number, prompt in enumerate(prompts)
    ]


def _image(images: str | os.PathLike[str] | None, number: int) -> Path | None:
    if images is None:
        return None
    place = Path(images)
    file = place / f"{number:03}.png" if place.is_dir() else place
    if not file.is_file():
        raise ValueError(f"there is no image {file}; give a file for all videos, or a folder with one for each number")
    return file


def _digests(words: Inputs | None = None, **files: Path | None) -> Callable[[], Inputs]:
    """Digests by words for them: those given, and of files when they are asked for."""
    return lambda: {**(words or {}), **{word: file_digest(file) for word, file in files.items() if file is not None}}


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
