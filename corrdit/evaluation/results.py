"""One file for each video and tracker, so that a run may be killed at any time and goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from corrdit.files import written_beside
from corrdit.tracking import Tracks

SETTINGS_FILE = "settings.json"
LONGEST_NAME = 120


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

    def record_file(self, tracker: str, video: str) -> Path:
        """Where the figures of a video are or will be."""
        return self.path / "videos" / file_name(tracker) / f"{file_name(video)}.json"

    def tracks_file(self, tracker: str, video: str) -> Path:
        """Where the tracks of a video are or will be."""
        return self.record_file(tracker, video).with_suffix(".npz")

    def failure_file(self, tracker: str, video: str) -> Path:
        """Where it is or would be said why a video could not be evaluated."""
        return self.path / "broken" / file_name(tracker) / f"{file_name(video)}.json"

    def pictures_folder(self, tracker: str) -> Path:
        """Where the drawn tracks of a tracker are."""
        return self.path / "pictures" / file_name(tracker)

    def is_done(self, trackers: Iterable[str], video: str) -> bool:
        """Whether the figures of a video are there for all trackers."""
        return all(self.record_file(tracker, video).is_file() for tracker in trackers)

    def write_record(
        self, tracker: str, video: str, record: Mapping[str, Any], tracks: Tracks | None = None, queries: Any = None
    ) -> None:
        """Write the figures of a video, after its tracks where they are given; an earlier failure is forgotten."""
        file = self.record_file(tracker, video)
        file.parent.mkdir(parents=True, exist_ok=True)
        if tracks is not None:
            tracks.save(self.tracks_file(tracker, video), queries=queries)
        _write_json(file, record)
        self.failure_file(tracker, video).unlink(missing_ok=True)

    def write_failure(self, tracker: str, video: str, error: str) -> None:
        """Write why a video could not be evaluated."""
        file = self.failure_file(tracker, video)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_json(file, {"tracker": tracker, "video": video, "error": error})

    def record(self, tracker: str, video: str) -> dict[str, Any] | None:
        """The figures of a video, or None where there are none yet."""
        return _read_json(self.record_file(tracker, video))

    def failure(self, tracker: str, video: str) -> str | None:
        """Why a video could not be evaluated, or None."""
        contents = _read_json(self.failure_file(tracker, video))
        return None if contents is None else str(contents.get("error"))

    def failures(self, tracker: str) -> list[dict[str, Any]]:
        """`{"tracker", "video", "error"}` of the videos that a tracker could not evaluate."""
        files = sorted((self.path / "broken" / file_name(tracker)).glob("*.json"))
        return [contents for contents in map(_read_json, files) if contents is not None]

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
        """Remove what a killed run left half-written; no other run may be at work in the folder."""
        for left in list(self.path.rglob(".*.part")) + list(self.path.rglob(".part-*")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def settings(self) -> dict[str, Any]:
        """How the results were made; empty where there are none.

        Raises:
            ValueError: `settings.json` is not such a file.
        """
        return _read_json(self.path / SETTINGS_FILE) or {}

    def settings_with(self, settings: Mapping[str, Any], *, unknown: Collection[str] = ()) -> dict[str, Any]:
        """`settings` joined with those of other trackers in the folder.

        Args:
            settings: `{"data": {...}, "trackers": {label: {...}}, "videos": [...]}`.
            unknown: entries of the trackers that are not known yet, and not compared.

        Raises:
            ValueError: results in the folder are of other data, or of a tracker of the same label that is another.
        """
        earlier = self.settings()
        if not earlier:
            return dict(settings)
        given = {"data": settings["data"], **settings["trackers"]}
        found = {"data": earlier.get("data", {}), **earlier.get("trackers", {})}
        for part, now in given.items():
            if part not in found:
                continue
            before = found[part]
            compared = sorted({*now, *before} - set(unknown))
            changed = [key for key in compared if now.get(key) != before.get(key)]
            if changed:
                said = ", ".join(f"{key} {before.get(key)!r} (now {now.get(key)!r})" for key in changed)
                raise ValueError(
                    f"{self.path} holds results made with other settings of {part}: {said}; give another output "
                    "folder, or the same settings to go on"
                )
        return {**settings, "trackers": {**earlier.get("trackers", {}), **settings["trackers"]}}

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write `settings.json`, whole."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self.path / SETTINGS_FILE, settings)


def file_name(name: str) -> str:
    """A name as part of a path: without separators, never hidden or "..", not too long, different for each name."""
    text = quote(name, safe=" ").replace(".", "%2E") if name.startswith(".") else quote(name, safe=" ")
    if not text or len(text) > LONGEST_NAME:
        return f"{text[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return text


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    with written_beside(path, "w") as file:
        json.dump(contents, file, indent=1, allow_nan=False)
        file.write("\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is not a file of an evaluation ({error}); remove it or give another folder"
        ) from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a file of an evaluation; remove it or give another folder")
    return contents
