"""TAP-Vid: reading and writing its files, and choosing queries as its protocol does.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video" (2022). Files are pickles: DAVIS a dict by
video name, RGB-Stacking a list, Kinetics a folder of shards `0000_of_0010.pkl`, each a list, RoboTAP a folder of dicts.
A video holds `video` (uint8 frames or jpeg files), `points` `[N, T, 2]` as (x, y) shares of the frame's width and
height, and `occluded` `[N, T]`.

The metric takes query points as (t, y, x) in a frame of 256 x 256; everything else here is (frame, x, y) in pixels of
the video. `TapVidSample.metric_arguments` is the one place that converts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corrdit.arguments import choice, whole_number
from corrdit.data.restricted_pickle import load_arrays
from corrdit.files import refuse_address
from corrdit.tracking.tracks import Tracks
from corrdit.video.info import FRAME_SUFFIXES, VIDEO_SUFFIXES

QUERY_MODES = ("first", "strided", "frame_0")
PUBLISHED_STRIDE = 5
METRIC_SIZE = 256
LARGEST_SHARE = 2.0
SHARD_PATTERN = "[0-9]*_of_[0-9]*.pkl"


@dataclass(frozen=True, eq=False)
class TapVidVideo:
    """One annotated video.

    Args:
        name: unique within the data set.
        video: uint8 `[T, H, W, 3]`, RGB.
        points: float64 `[N, T, 2]`, (x, y) as shares of width and height, the origin at the top left corner.
        occluded: bool `[N, T]`.
        reach: float64 `[T, 2]`, distance in x and y, as shares of width and height, within which PCK calls a point
            correct; NaN in frames without one, None where no frame has one.
        annotated: bool `[T]`, the frames of which anything is known: what is in no other is scored. None for all.

    Raises:
        ValueError: shapes or types that do not fit, NaN where a point is visible, positions that are no shares, a
            point that is visible in a frame without annotation.
    """

    name: str
    video: np.ndarray
    points: np.ndarray
    occluded: np.ndarray
    reach: np.ndarray | None = None
    annotated: np.ndarray | None = None

    def __post_init__(self) -> None:
        video, points, occluded = np.asarray(self.video), np.asarray(self.points), np.asarray(self.occluded)
        if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or 0 in video.shape:
            raise ValueError(
                f"video {self.name!r}: frames must be uint8 [frames, height, width, 3], got {video.dtype} {video.shape}"
            )
        if points.ndim != 3 or points.shape[1:] != (len(video), 2) or points.dtype.kind not in "fiu":
            raise ValueError(
                f"video {self.name!r}: points must be numbers [points, {len(video)} frames, 2], "
                f"got {points.dtype} {points.shape}"
            )
        if occluded.shape != points.shape[:2] or not np.isin(occluded, (0, 1)).all():
            raise ValueError(
                f"video {self.name!r}: occluded must be boolean {points.shape[:2]}, "
                f"got {occluded.dtype} {occluded.shape}"
            )
        points, occluded = points.astype(np.float64), occluded.astype(bool)
        visible = points[~occluded]
        if not np.isfinite(visible).all():
            raise ValueError(f"video {self.name!r}: points holds NaN or infinite positions of visible points")
        if visible.size and np.abs(visible).max() > LARGEST_SHARE:
            raise ValueError(
                f"video {self.name!r}: points go up to {np.abs(visible).max():.4g}; they must be shares of width and "
                "height (0 to 1), not pixels"
            )
        if self.annotated is not None and (
            self.annotated.shape != (len(video),) or not occluded[:, ~self.annotated].all()
        ):
            raise ValueError(
                f"video {self.name!r}: annotated must be boolean [{len(video)} frames], with no point visible in a "
                "frame without annotation"
            )
        for name, value in (("video", video), ("points", points), ("occluded", occluded)):
            object.__setattr__(self, name, value)

    def shortened(self, frames: int) -> TapVidVideo:
        """Its first frames, at least one; the whole video where it has no more."""
        frames = whole_number("frames", frames, 1)
        if frames >= len(self.video):
            return self
        reach, annotated = (None if of is None else of[:frames] for of in (self.reach, self.annotated))
        points, occluded = self.points[:, :frames], self.occluded[:, :frames]
        return TapVidVideo(self.name, self.video[:frames], points, occluded, reach, annotated)

    def sample(self, mode: str = "first", *, stride: int = PUBLISHED_STRIDE) -> TapVidSample:
        """Queries as the protocol chooses them.

        Args:
            mode: "first" takes every point where it is first visible; "strided" every point visible in frame 0,
                `stride`, 2 * `stride`, ...; "frame_0" is "first" without the points not visible in frame 0
                (DiffTrack's released evaluation).
            stride: frames between queries, for "strided".

        Raises:
            ValueError: an unknown mode or a stride below 1.
        """
        choice("mode", mode, QUERY_MODES)
        stride = whole_number("stride", stride, 1)
        visible = ~self.occluded
        if mode == "strided":
            frame, point = np.nonzero(visible[:, ::stride].T)
            frame = frame * stride
        else:
            seen = visible[:, 0] if mode == "frame_0" else visible.any(axis=1)
            (point,) = np.nonzero(seen)
            frame = visible[point].argmax(axis=1)
        pixels = self.points * np.array([self.video.shape[2], self.video.shape[1]])
        return TapVidSample(
            name=self.name,
            video=self.video,
            queries=np.concatenate([frame[:, None], pixels[point, frame]], axis=1),
            tracks=pixels[point],
            occluded=self.occluded[point],
            point=point,
            metric_mode="strided" if mode == "strided" else "first",
            reach=None if self.reach is None else self.reach * [self.video.shape[2], self.video.shape[1]],
            annotated=self.annotated,
        )


@dataclass(frozen=True, eq=False)
class TapVidSample:
    """A video with queries and truth, ready for a tracker.

    Args:
        name: of the video.
        video: uint8 `[T, H, W, 3]`.
        queries: float64 `[Q, 3]`, (frame, x, y) in pixels of the video; Q is 0 where no point is ever visible.
        tracks: float64 `[Q, T, 2]`, (x, y) in pixels of the video.
        occluded: bool `[Q, T]`.
        point: int64 `[Q]`, the annotated point each query belongs to.
        metric_mode: the `query_mode` of `corrdit.metrics.tapvid` that fits: "first" or "strided".
        reach: float64 `[T, 2]`, of PCK in x and y, in pixels of the video; NaN where a frame has none, or None.
        annotated: bool `[T]`, the frames that may be scored; None for all. Every query is in one of them.
    """

    name: str
    video: np.ndarray
    queries: np.ndarray
    tracks: np.ndarray
    occluded: np.ndarray
    point: np.ndarray
    metric_mode: str
    reach: np.ndarray | None = None
    annotated: np.ndarray | None = None

    def annotated_frames(self) -> np.ndarray:
        """int64 `[A]`, the numbers of the frames that may be scored."""
        return np.arange(len(self.video)) if self.annotated is None else np.flatnonzero(self.annotated)

    def metric_arguments(self, predicted: Tracks) -> dict[str, Any]:
        """What `corrdit.metrics.tapvid` takes, in frames of 256 x 256, with a batch axis of one: the annotated frames.

        Args:
            predicted: tracks of the queries in their order, in pixels of the video.

        Raises:
            ValueError: another number of frames or points than the sample has.
        """
        frames, height, width = self.video.shape[:3]
        if (predicted.frames, predicted.points) != (frames, len(self.queries)):
            raise ValueError(
                f"video {self.name!r} has {frames} frames and {len(self.queries)} queries, the prediction has "
                f"{predicted.frames} frames and {predicted.points} points"
            )
        scale = METRIC_SIZE / np.array([width, height])
        kept = self.annotated_frames()
        time = np.searchsorted(kept, np.rint(self.queries[:, :1]))
        place = self.queries[:, 1:] * scale
        return {
            "query_points": np.concatenate([time, place[:, ::-1]], axis=1)[None],
            "gt_occluded": self.occluded[None, :, kept],
            "gt_tracks": (self.tracks[:, kept] * scale)[None],
            "pred_occluded": ~predicted.visible.numpy()[kept].T[None],
            "pred_tracks": predicted.xy.numpy()[kept].transpose(1, 0, 2).astype(np.float64)[None] * scale,
            "query_mode": self.metric_mode,
        }


def read_tapvid(
    path: str | os.PathLike[str],
    *,
    on_broken: Callable[[str, ValueError], None] | None = None,
    incomplete: bool = False,
) -> Iterator[TapVidVideo]:
    """The videos of a TAP-Vid file or folder of shards, one after another.

    Of a sharded set one shard is in memory at a time, and jpeg frames are decoded for one video at a time. Names are
    the keys of a dict (in sorted order), or the number in a list, after the shard's name where there are shards:
    `0003_of_0010/0017`.

    Args:
        path: a pickle (DAVIS, RGB-Stacking), or a folder of shards `NNNN_of_NNNN.pkl` (Kinetics) or of pickles by any
            other name (RoboTAP: `robotap_split0.pkl` ...).
        on_broken: called with the name and the error of a video or shard that cannot be read, which is then left out;
            without it the error is raised.
        incomplete: whether shards may be missing.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without shards, or with some missing; a file or video that is not TAP-Vid's, when
            `on_broken` is not given.
    """
    path = Path(path)
    files = [(path, "")]
    if path.is_dir():
        files = [(file, f"{file.stem}/") for file in pickle_files(path, incomplete=incomplete)]
    for file, prefix in files:
        try:
            entries = file_entries(file)
        except ValueError as error:
            if on_broken is None:
                raise
            on_broken(file.name, error)
            continue
        while entries:
            name, entry = entries.pop(0)
            try:
                video = annotated_video(prefix + name, entry)
            except ValueError as error:
                if on_broken is None:
                    raise ValueError(f"{file}: {error}") from error
                on_broken(prefix + name, error)
                continue
            yield video


def pickle_files(path: Path, *, incomplete: bool = False) -> list[Path]:
    """The shards of a folder, or where there are none its pickles by their names; ValueError as `shard_files`."""
    others = sorted(path.glob("*.pkl"))
    if any(path.glob(SHARD_PATTERN)) or not others:
        return shard_files(path, incomplete=incomplete)
    return others


def shard_files(path: Path, *, incomplete: bool = False) -> list[Path]:
    """All shards of a folder in order; ValueError where there are none, or some are missing and may not be."""
    shards = sorted(path.glob(SHARD_PATTERN))
    if not shards:
        raise ValueError(f"{path} holds no shards named like 0000_of_0010.pkl; give a TAP-Vid file or such a folder")
    expected = int(shards[0].stem.split("_of_")[1])
    names = [f"{index:04}_of_{expected:04}" for index in range(expected)]
    missing = [name for name in names if path / f"{name}.pkl" not in shards]
    if (missing and not incomplete) or len(shards) + len(missing) != expected:
        raise ValueError(
            f"{path} holds {len(shards)} of {expected} shards; missing are {', '.join(missing) or 'none'}, and shards "
            "of different sets must not share a folder; --incomplete (incomplete=True) takes those that are there"
        )
    return shards


def file_entries(file: Path) -> list[tuple[str, object]]:
    """Names and raw contents of the videos of a file; ValueError where it is no TAP-Vid file."""
    refuse_address(file)
    if file.suffix.lower() in VIDEO_SUFFIXES + FRAME_SUFFIXES:
        raise ValueError(
            f"{file} is a video or a picture; a TAP-Vid file is a pickle of videos with annotated points (.pkl), and "
            "without annotations nothing can be scored (`corrdit track` follows points through a video)"
        )
    if file.suffix.lower() == ".json":
        raise ValueError(
            f"{file} is no pickle; annotated joints are read with the video beside them: give {file.parent}"
        )
    contents = load_arrays(file)
    if isinstance(contents, dict) and contents and all(isinstance(entry, dict) for entry in contents.values()):
        return [(str(name), contents[name]) for name in sorted(contents, key=str)]
    if isinstance(contents, (list, tuple)) and contents:
        return [(f"{index:04}", entry) for index, entry in enumerate(contents)]
    raise ValueError(
        f"{file} is not a TAP-Vid file: expected a dict or list of videos, got {type(contents).__name__} "
        f"of {len(contents) if hasattr(contents, '__len__') else 'no'} entries"
    )


def annotated_video(name: str, entry: object) -> TapVidVideo:
    """The video of raw contents, jpeg frames decoded; ValueError where something is missing or broken."""
    keys = ("video", "points", "occluded")
    if not isinstance(entry, dict) or not all(key in entry for key in keys):
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"video {name!r} must hold video, points and occluded, found {found or 'nothing'}")
    points, occluded = (_array(name, key, entry[key]) for key in ("points", "occluded"))
    return TapVidVideo(name, _frames(name, entry["video"]), points, occluded)


def _frames(name: str, video: object) -> np.ndarray:
    """uint8 frames as they are, jpeg files decoded."""
    if not isinstance(video, (list, tuple, np.ndarray)) or (isinstance(video, np.ndarray) and video.ndim == 0):
        raise ValueError(f"video {name!r}: frames must be an array or a list of jpeg files, got {type(video).__name__}")
    if len(video) and isinstance(video[0], bytes):
        import imageio.v3 as imageio
        from PIL.Image import DecompressionBombError

        pictures = []
        for index, encoded in enumerate(video):
            if not isinstance(encoded, bytes):
                raise ValueError(f"video {name!r}: frame {index} is {type(encoded).__name__}, not a jpeg file")
            try:
                pictures.append(imageio.imread(encoded, plugin="pillow", mode="RGB"))
            except (OSError, ValueError, SyntaxError, EOFError, struct.error, DecompressionBombError) as error:
                raise ValueError(f"video {name!r}: frame {index} cannot be decoded as a picture: {error}") from error
        sizes = {picture.shape for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(f"video {name!r}: frames are of different sizes: {sorted(sizes)}")
        return np.stack(pictures)
    return _array(name, "video", video)


def _array(name: str, key: str, value: object) -> np.ndarray:
    try:
        return np.array(value)
    except ValueError as error:
        raise ValueError(f"video {name!r}: {key} is not an array: {error}") from error
