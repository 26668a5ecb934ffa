"""One file for each video and tracker, so that a run may be killed at any time and goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypedDict, cast
from urllib.parse import quote

import numpy as np

from corrdit.files import read_json, remove_unfinished
from corrdit.runs import Inputs, ResultFolder, refuse_other_settings
from corrdit.tracking import Tracks

LONGEST_NAME = 120
_NAMED = 5
"""Most videos of a kind that a message names."""


class EvaluationSettings(TypedDict, total=False):
    """How the results of an evaluation were made: options by tracker, and the digest of each video."""

    data: dict[str, object]
    trackers: dict[str, dict[str, object]]
    videos: list[str]
    inputs: dict[str, Inputs]


class Failure(TypedDict):
    """Why a tracker could not evaluate a video."""

    tracker: str
    video: str
    error: str


class EvaluationResults:
    """The folder of an evaluation.

    `settings.json` says how the results were made; `videos/TRACKER/VIDEO.json` holds the figures of one video, and
    `VIDEO.npz` beside it the tracks; `broken/TRACKER/VIDEO.json` says why one could not be evaluated. Names of videos
    are written so that none leads out of the folder, whatever a data set calls them.

    Args:
        path: the folder; made when something is written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.folder = ResultFolder(
            path, what="an evaluation", record="videos/{name}.json", failure="broken/{name}.json", results="videos"
        )

    def record_file(self, tracker: str, video: str) -> Path:
        """Where the figures of a video are or will be."""
        return self.folder.record_file(_item(tracker, video))

    def tracks_file(self, tracker: str, video: str) -> Path:
        """Where the tracks of a video are or will be."""
        return self.record_file(tracker, video).with_suffix(".npz")

    def failure_file(self, tracker: str, video: str) -> Path:
        """Where it is or would be said why a video could not be evaluated."""
        return self.folder.failure_file(_item(tracker, video))

    def pictures_folder(self, tracker: str) -> Path:
        """Where the drawn tracks of a tracker are."""
        return self.path / "pictures" / file_name(tracker)

    def picture_file(self, tracker: str, video: str) -> Path:
        """Where the contact sheet of a video's tracks is or will be."""
        return self.pictures_folder(tracker) / f"{file_name(video)}.png"

    def unmade(self, tracker: str, video: str, inputs: Inputs | None = None) -> str | None:
        """Why a tracker has to evaluate a video, as `ResultFolder.unmade`."""
        return self.folder.unmade(_item(tracker, video), inputs)

    def is_done(self, trackers: Iterable[str], video: str, inputs: Inputs | None = None) -> bool:
        """Whether the figures of a video are there for all trackers, undamaged, and of these inputs if given."""
        return all(self.unmade(tracker, video, inputs) is None for tracker in trackers)

    def write_record(
        self,
        tracker: str,
        video: str,
        record: Mapping[str, object],
        tracks: Tracks | None = None,
        queries: np.ndarray | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """Write the figures of a video, after its tracks where they are given; an earlier failure is forgotten."""
        files = []
        if tracks is not None:
            files = [self.tracks_file(tracker, video)]
            files[0].parent.mkdir(parents=True, exist_ok=True)
            tracks.save(files[0], queries=queries)
        self.folder.finish(_item(tracker, video), record, inputs, files)

    def write_failure(self, tracker: str, video: str, error: str) -> None:
        """Write why a video could not be evaluated."""
        self.folder.fail(_item(tracker, video), error, tracker=tracker, video=video)

    def record(self, tracker: str, video: str) -> dict[str, object] | None:
        """The figures of a video, or None where there are none yet.

        Raises:
            ValueError: they are damaged, or were changed by hand.
        """
        return self.folder.record(_item(tracker, video))

    def failure(self, tracker: str, video: str) -> str | None:
        """Why a video could not be evaluated, or None."""
        return self.folder.failure(_item(tracker, video))

    def failures(self, tracker: str) -> list[Failure]:
        """`{"tracker", "video", "error"}` of the videos that a tracker could not evaluate."""
        files = sorted((self.path / "broken" / file_name(tracker)).glob("*.json"))
        return [cast(Failure, read_json(file)) for file in files]

    def any_failure(self, trackers: Iterable[str]) -> bool:
        """Whether any of the trackers could not evaluate some video."""
        folders = [self.path / "broken" / file_name(tracker) for tracker in trackers]
        return any(next(folder.glob("*.json"), None) is not None for folder in folders)

    def forget_failures(self, trackers: Iterable[str]) -> None:
        """Remove what is said about broken videos, for they are tried again."""
        for tracker in trackers:
            for file in (self.path / "broken" / file_name(tracker)).glob("*.json"):
                file.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove what killed runs left half-written."""
        for folder, _, _ in os.walk(self.path):
            remove_unfinished(Path(folder))

    def settings(self) -> EvaluationSettings:
        """How the results were made; empty where there are none.

        Raises:
            ValueError: `settings.json` is not such a file.
        """
        return cast(EvaluationSettings, self.folder.settings())

    def settings_with(self, settings: EvaluationSettings, *, unknown: Collection[str] = ()) -> EvaluationSettings:
        """`settings` joined with those of other trackers in the folder.

        Args:
            settings: of this run.
            unknown: entries of the trackers that are not known yet, and not compared.

        Raises:
            ValueError: results in the folder are of other data, or of a tracker of the same label that is another.
        """
        earlier = self.settings()
        if not earlier:
            return settings
        self._refuse_other_videos(earlier.get("videos", []), settings["videos"])
        given = {"data": settings["data"], **settings["trackers"]}
        found = {"data": earlier.get("data", {}), **earlier.get("trackers", {})}
        for part in given.keys() & found.keys():
            now, before = given[part], found[part]
            compared = sorted({*now, *before} - set(unknown))
            refuse_other_settings(self.path, before, {key: now.get(key) for key in compared}, of=f" of {part}")
        return {**settings, "trackers": {**earlier.get("trackers", {}), **settings["trackers"]}}

    def _refuse_other_videos(self, before: Collection[str], now: Collection[str]) -> None:
        """Raises ValueError where the results are of other videos, and names them."""
        changes = {"no longer there": set(before) - set(now), "new": set(now) - set(before)}
        if before and any(changes.values()):
            said = "; ".join(
                f"{', '.join(sorted(names)[:_NAMED])}{' ...' if len(names) > _NAMED else ''} {change}"
                for change, names in changes.items()
                if names
            )
            raise ValueError(
                f"{self.path} holds results of other videos: {said}; give another output folder, or the same videos to "
                "go on"
            )

    def begin(self, settings: EvaluationSettings) -> None:
        """Join the settings with those of other trackers, clear up after runs that were killed, and forget failures.

        Raises:
            ValueError: as `settings_with`.
        """
        self.folder.begin(settings, joined=lambda _: self.settings_with(settings))
        self.forget_failures(settings["trackers"])

    def write_settings(self, settings: EvaluationSettings) -> None:
        """Write `settings.json`, whole."""
        self.folder.begin(settings, joined=lambda _: settings)


def file_name(name: str) -> str:
    """A name as part of a path: without separators, never hidden or "..", not too long, different for each name."""
    text = quote(name, safe=" ").replace(".", "%2E") if name.startswith(".") else quote(name, safe=" ")
    if not text or len(text) > LONGEST_NAME:
        return f"{text[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return text


def _item(tracker: str, video: str) -> str:
    return f"{file_name(tracker)}/{file_name(video)}"
