"""The folder an analysis writes: one result or one failure for each video, which a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        tables: by the names of the videos.
        failures: error by name.
    """

    settings: dict[str, Any]
    tables: dict[str, AnalysisTable]
    failures: dict[str, str]

    def total(self) -> AnalysisTable:
        """The sum over the videos.

        Raises:
            ValueError: no video has a result; says why the first one failed.
        """
        if not self.tables:
            reason = next((f"; {name}: {error}" for name, error in self.failures.items()), "")
            raise ValueError(f"none of the videos could be analysed ({len(self.failures)} failed{reason})")
        return total(list(self.tables.values()))


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


def write_failure(output: str | os.PathLike[str], name: str, error: Exception) -> None:
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
        ValueError: not the folder of an analysis, or a damaged result.
    """
    settings, root = _settings(output), Path(output) / VIDEOS_FOLDER
    if names is None:
        found = {file.parent.relative_to(root).as_posix() for file in root.rglob(RESULT_FILE)}
        found |= {file.parent.relative_to(root).as_posix() for file in root.rglob(FAILURE_FILE)}
        names = sorted(found)
    tables, failures = {}, {}
    for name in names:
        failure = video_folder(output, name) / FAILURE_FILE
        if has_analysis(output, name):
            tables[name] = AnalysisTable.load(video_folder(output, name) / RESULT_FILE)
        elif failure.is_file():
            failures[name] = json.loads(failure.read_text(encoding="utf-8"))["error"]
    return AnalysisResults(settings, tables, failures)


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
