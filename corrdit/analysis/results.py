"""The folder an analysis writes: one result or one failure for each video, which a later run goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrdit.analysis.calibration import Calibration, calibrate
from corrdit.analysis.table import AnalysisTable, total
from corrdit.runs import FAILURE_FILE, SETTINGS_FILE, Inputs, ResultFolder

RESULT_FILE = "analysis.npz"
VIDEOS_FOLDER = "videos"
PICTURES_FOLDER = "pictures"
DATASET_FOLDER = "dataset"
"""Generated videos with their tracks, in the layout of DiffTrack's data set."""


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
    _totals: list[AnalysisTable] = field(default_factory=list, init=False, repr=False, compare=False)
    _chosen: dict[float | None, Calibration] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def counted(self) -> Mapping[str, AnalysisTable]:
        """The tables as they are averaged: as they are, or each video's own figures as one case."""
        if self.settings.get("options", {}).get("average") != "released":
            return self.tables
        return VideoMeans(self.tables)

    def total(self) -> AnalysisTable:
        """The sum over the videos, pooled or of their means as the settings say, worked out once.

        Raises:
            ValueError: no video has a result; says why the first one failed.
        """
        if not self.tables:
            reason = next((f"; {name}: {error}" for name, error in self.failures.items()), "")
            raise ValueError(f"none of the videos could be analysed ({len(self.failures)} failed{reason})")
        if not self._totals:
            self._totals.append(total(self.counted.values()))
        return self._totals[0]

    def calibration(self, *, threshold: float | None = None) -> Calibration:
        """What `corrdit.analysis.calibrate` chooses, worked out once a threshold.

        Raises:
            ValueError: as `total` and `calibrate`.
        """
        summed = self.total()
        if threshold not in self._chosen:
            self._chosen[threshold] = calibrate(self.counted.values(), summed=summed, threshold=threshold)
        return self._chosen[threshold]


class StoredTables(Mapping[str, AnalysisTable]):
    """The tables of a folder by the names of its videos, each read when it is asked for and not kept.

    Args:
        output: the folder.
        names: of videos that have a result.
    """

    def __init__(self, output: str | os.PathLike[str], names: Iterable[str]) -> None:
        self._folder, self._names = analysis_folder(output), dict.fromkeys(names)

    def __getitem__(self, name: str) -> AnalysisTable:
        if name not in self._names:
            raise KeyError(name)
        return AnalysisTable.load(self._folder.files_of(name) / RESULT_FILE)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class VideoMeans(Mapping[str, AnalysisTable]):
    """Tables of videos, each by its `video_means` when it is asked for.

    Args:
        tables: by the names of the videos.
    """

    def __init__(self, tables: Mapping[str, AnalysisTable]) -> None:
        self._tables = tables

    def __getitem__(self, name: str) -> AnalysisTable:
        return self._tables[name].video_means()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


def analysis_folder(output: str | os.PathLike[str]) -> ResultFolder:
    """The folder of an analysis, with the files of each video in `videos/NAME`."""
    place = f"{VIDEOS_FOLDER}/{{name}}"
    return ResultFolder(output, what="an analysis", failure=f"{place}/{FAILURE_FILE}", results=place)


def has_analysis(output: str | os.PathLike[str], name: str) -> bool:
    """Whether the result of a video is there; it is put in place as a whole."""
    return (analysis_folder(output).files_of(name) / RESULT_FILE).is_file()


def write_result(
    output: str | os.PathLike[str],
    name: str,
    table: AnalysisTable,
    inputs: Inputs | None = None,
    *,
    files: Iterable[Path] = (),
) -> None:
    """Put the result of a video in place; an earlier failure is forgotten.

    Args:
        output: the folder.
        name: of the video.
        table: its counts.
        inputs: digests of what was analysed.
        files: further ones that belong to the result, in the folder.
    """
    folder = analysis_folder(output)
    file = folder.files_of(name) / RESULT_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    table.save(file)
    folder.finish(name, {}, inputs, [file, *files])


def write_failure(output: str | os.PathLike[str], name: str, error: Exception | str) -> None:
    """Say why a video has no result."""
    folder = analysis_folder(output)
    (folder.files_of(name) / RESULT_FILE).unlink(missing_ok=True)
    folder.fail(name, str(error))


def read_results(output: str | os.PathLike[str], names: Iterable[str] | None = None) -> AnalysisResults:
    """Results and failures of a folder.

    Args:
        output: the folder.
        names: of the videos; None for all that are there.

    Raises:
        ValueError: not the folder of an analysis; later, when a damaged result is read.
    """
    folder = None if os.path.isfile(output) else analysis_folder(output)
    settings = {} if folder is None else folder.settings()
    if folder is None or not settings:
        raise ValueError(f"{os.fspath(output)} holds no analysis (no {SETTINGS_FILE}); give the folder of one")
    if names is None:
        root = folder.path / VIDEOS_FOLDER
        files = [file for kind in (RESULT_FILE, FAILURE_FILE) for file in root.rglob(kind)]
        names = sorted({file.parent.relative_to(root).as_posix() for file in files})
    done: list[str] = []
    failures: dict[str, str] = {}
    for name in names:
        if has_analysis(output, name):
            done.append(name)
        elif (failure := folder.failure(name)) is not None:
            failures[name] = failure
    return AnalysisResults(settings, StoredTables(output, done), failures)
