"""The folder an analysis writes: one result or one failure for each video, which a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrdit.analysis.calibration import Calibration, calibrate
from corrdit.analysis.table import AnalysisTable, total
from corrdit.files import refuse_other_settings, written_beside

RESULT_FILE = "analysis.npz"
FAILURE_FILE = "failed.json"
SETTINGS_FILE = "settings.json"
VIDEOS_FOLDER = "videos"


@dataclass(frozen=True)
class AnalysisResults:
    """What a folder holds.

    Args:
        settings: how the results were made.
        tables: by the names of the videos; those of a folder are read anew each time, so that memory does not grow
            with the videos.
        failures: error by name.
    """

    settings: dict[str, Any]
    tables: Mapping[str, AnalysisTable]
    failures: dict[str, str]
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def total(self) -> AnalysisTable:
        """The sum over the videos, worked out once.

        Raises:
            ValueError: no video has a result; says why the first one failed.
        """
        if not self.tables:
            reason = next((f"; {name}: {error}" for name, error in self.failures.items()), "")
            raise ValueError(f"none of the videos could be analysed ({len(self.failures)} failed{reason})")
        if "total" not in self._known:
            self._known["total"] = total(self.tables.values())
        return self._known["total"]

    def calibration(self, *, threshold: float | None = None) -> Calibration:
        """What `corrdit.analysis.calibrate` chooses, worked out once a threshold.

        Raises:
            ValueError: as `total` and `calibrate`.
        """
        summed = self.total()
        if threshold not in self._known:
            self._known[threshold] = calibrate(self.tables.values(), summed=summed, threshold=threshold)
        return self._known[threshold]


class StoredTables(Mapping[str, AnalysisTable]):
    """The tables of a folder by the names of its videos, each read when it is asked for and not kept.

    Args:
        output: the folder.
        names: of videos that have a result.
    """

    def __init__(self, output: str | os.PathLike[str], names: Iterable[str]) -> None:
        self._output, self._names = Path(output), dict.fromkeys(names)

    def __getitem__(self, name: str) -> AnalysisTable:
        if name not in self._names:
            raise KeyError(name)
        return AnalysisTable.load(video_folder(self._output, name) / RESULT_FILE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def video_folder(output: str | os.PathLike[str], name: str) -> Path:
    """Where the result of a video is."""
    return Path(output) / VIDEOS_FOLDER / name


def has_analysis(output: str | os.PathLike[str], name: str) -> bool:
    """Whether the result of a video is there; it is put in place as a whole."""
    return (video_folder(output, name) / RESULT_FILE).is_file()


def write_result(output: str | os.PathLike[str], name: str, table: AnalysisTable) -> None:
    """Put the result of a video in place; an earlier failure is forgotten."""
    folder = video_folder(output, name)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / RESULT_FILE)
    (folder / FAILURE_FILE).unlink(missing_ok=True)


def write_failure(output: str | os.PathLike[str], name: str, error: Exception | str) -> None:
    """Say why a video has no result."""
    folder = video_folder(output, name)
    folder.mkdir(parents=True, exist_ok=True)
    with written_beside(folder / FAILURE_FILE, "w") as file:
        json.dump({"name": name, "error": str(error)}, file, indent=2)


def begin(output: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Make the folder and keep how its results are made.

    Raises:
        ValueError: it holds results made otherwise.
    """
    check_settings(output, settings)
    Path(output).mkdir(parents=True, exist_ok=True)
    with written_beside(Path(output) / SETTINGS_FILE, "w") as file:
        json.dump(settings, file, indent=2)


def check_settings(output: str | os.PathLike[str], settings: dict[str, Any]) -> None:
    """Raises ValueError where the folder holds results that were made with other settings."""
    if not (Path(output) / SETTINGS_FILE).is_file():
        return
    refuse_other_settings(output, _settings(output), json.loads(json.dumps(settings)))


def read_results(output: str | os.PathLike[str], names: Iterable[str] | None = None) -> AnalysisResults:
    """Results and failures of a folder.

    Args:
        output: the folder.
        names: of the videos; None for all that are there.

    Raises:
        ValueError: not the folder of an analysis; later, when a damaged result is read.
    """
    settings, root = _settings(output), Path(output) / VIDEOS_FOLDER
    if names is None:
        found = {file.parent.relative_to(root).as_posix() for file in root.rglob(RESULT_FILE)}
        found |= {file.parent.relative_to(root).as_posix() for file in root.rglob(FAILURE_FILE)}
        names = sorted(found)
    done, failures = [], {}
    for name in names:
        failure = video_folder(output, name) / FAILURE_FILE
        if has_analysis(output, name):
            done.append(name)
        elif failure.is_file():
            failures[name] = json.loads(failure.read_text(encoding="utf-8"))["error"]
    return AnalysisResults(settings, StoredTables(output, done), failures)


def _settings(output: str | os.PathLike[str]) -> dict[str, Any]:
    file = Path(output) / SETTINGS_FILE
    if not file.is_file():
        raise ValueError(f"{os.fspath(output)} holds no analysis (no {SETTINGS_FILE}); give the folder of one")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a settings file ({error}); give another output folder") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is not a settings file; give another output folder")
    return settings
