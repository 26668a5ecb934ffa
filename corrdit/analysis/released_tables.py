"""The tables of an analysis in the formats of DiffTrack's released scripts, for what reads those.

```
NNN/qk_acc.txt, NNN/feat_acc.txt      a line a layer, "Layer 0: ..." with the accuracy in percent at each step
NNN/confidence_score.xlsx, NNN/attention_score.xlsx
                                      three rows a step (self, cross, text), a column a layer
total_qk_acc.csv, total_feat_acc.csv  means over videos, the layer's number before its row
total_confidence_score.xlsx, total_attention_score.xlsx
                                      means over videos, without the row of names
harmonic_mean.csv                     a row a step, a column a layer
```

Numbers have four digits behind the point before they are averaged, as there. Only the steps and layers that were
analysed are written; the released scripts read all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from corrdit.analysis.protocols import FEATURE_READINGS
from corrdit.analysis.sheets import Cell, write_sheet
from corrdit.analysis.table import MEAN, AnalysisTable
from corrdit.files import OutputFolder
from corrdit.metrics.harmonic import harmonic_mean

RELEASED_FOLDER = "released"
DIGITS = 4
_PARTS = {"self": "own", "cross": "cross", "text": "text"}
"""Rows of a step by the released names."""
_ACCURACIES = {"qk_acc": MEAN, "feat_acc": FEATURE_READINGS[0]}


def write_released_tables(output: str | os.PathLike[str], tables: Mapping[str, AnalysisTable]) -> list[Path]:
    """Write `released/` into the folder of an analysis, in place of an earlier one.

    The accuracy is that at the main threshold, which is 8 pixels by the published protocol; that of features is of the
    attention output and is left out where features are. Where a harmonic mean is not defined (one cell, or cells that
    are all the same) it is left out.

    Args:
        output: the folder.
        tables: of each video, all of the same layers and steps.

    Returns:
        The files over all videos.

    Raises:
        ValueError: no table.
    """
    if not tables:
        raise ValueError("there is no result to write; every video failed or none was analysed")
    first = next(iter(tables.values()))
    accuracies = {name: reading for name, reading in _ACCURACIES.items() if reading in first.readings}
    sums: dict[str, np.ndarray] = {}
    with OutputFolder(Path(output) / RELEASED_FOLDER, whole=True) as folder:
        for name, table in tables.items():
            place = folder / name
            place.mkdir(parents=True)
            for file, reading in accuracies.items():
                values = _rounded(100 * table.accuracy()[..., table.readings.index(reading)].T)
                (place / f"{file}.txt").write_text(_accuracy_text(table, values), encoding="utf-8")
                sums[file] = sums.get(file, 0) + values
            for file, score in (
                ("confidence_score", table.confidence_score),
                ("attention_score", table.attention_score),
            ):
                values = _scores(score)
                names = ["timestep", "type", *(f"layer{layer}" for layer in table.layers)]
                write_sheet(place / f"{file}.xlsx", [names, *_score_rows(table, values)])
                sums[file] = sums.get(file, 0) + values
        means = {file: total / len(tables) for file, total in sums.items()}
        written = _write_totals(folder, first, means)
    return [Path(output) / RELEASED_FOLDER / name for name in written]


def _write_totals(folder: Path, table: AnalysisTable, means: Mapping[str, np.ndarray]) -> list[str]:
    sheets = {f"total_{file}.xlsx": values for file, values in means.items() if file not in _ACCURACIES}
    for name, values in sheets.items():
        write_sheet(folder / name, _score_rows(table, values))
    contents = {}
    for file in means.keys() & _ACCURACIES.keys():
        numbered = np.column_stack([np.array(table.layers, dtype=float), means[file]])
        contents[f"total_{file}.csv"] = _rows(numbered, lambda value: f"{value:.{DIGITS}f}")
    accuracy = _rounded(means["qk_acc"].T)
    confidence, attention = (means[file][:, 1] for file in ("confidence_score", "attention_score"))
    given = (accuracy, confidence, attention)
    if all(np.isfinite(values).all() and values.max() > values.min() for values in given):
        contents["harmonic_mean.csv"] = _rows(harmonic_mean(*given), repr)
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted([*sheets, *contents])


def _scores(score: Callable[[str], np.ndarray]) -> np.ndarray:
    """`[S, 3, L]` of the mean over heads: self, cross, text."""
    return np.stack([_rounded(score(part)[..., 0]) for part in _PARTS.values()], axis=1)


def _rounded(values: np.ndarray) -> np.ndarray:
    """By the decimal digits, as texts are; numpy's rounding is off by one in the last digit at some halves."""
    return np.array([round(float(value), DIGITS) for value in values.flat]).reshape(values.shape)


def _accuracy_text(table: AnalysisTable, values: np.ndarray) -> str:
    rows = zip(table.layers, values, strict=True)
    return "".join(f"Layer {layer}: {', '.join(f'{value:.{DIGITS}f}' for value in row)}\n" for layer, row in rows)


def _score_rows(table: AnalysisTable, values: np.ndarray) -> list[list[Cell]]:
    """As in the released sheets the step stands in the first of its rows alone."""
    return [
        [None if number else f"timestep{step}", part, *map(float, row)]
        for step, parts in zip(table.steps, values, strict=True)
        for number, (part, row) in enumerate(zip(_PARTS, parts, strict=True))
    ]


def _rows(values: np.ndarray, written: Callable[[float], str]) -> str:
    return "".join(",".join(written(float(value)) for value in row) + "\n" for row in values)
