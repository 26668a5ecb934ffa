"""Analysis tables as rows, one for each step, layer and reading or one for each video, and as Parquet."""

from __future__ import annotations

import importlib.util
import os

import numpy as np

from corrdit.analysis.calibration import Calibration
from corrdit.analysis.results import AnalysisResults
from corrdit.analysis.table import ATTENTION_SCORES, AnalysisTable
from corrdit.files import written_beside
from corrdit.metrics.harmonic import harmonic_mean


def harmonic_table(table: AnalysisTable, *, moving: bool = False) -> np.ndarray | None:
    """DiffTrack's harmonic mean for each step and layer, `[S, L]`; None where it is not defined.

    It needs a value in every cell, and at least two that differ in each of accuracy, confidence and cross-frame
    attention.
    """
    given = (table.accuracy(moving=moving), table.confidence_score(), table.attention_score("cross"))
    layered = [values[..., 0].T for values in given]
    if not all(np.isfinite(values).all() and values.max() > values.min() for values in layered):
        return None
    return harmonic_mean(*layered).T


def table_rows(table: AnalysisTable) -> list[dict[str, object]]:
    """One row for each step, layer and reading, numbers that are not defined left out as None.

    Attention and confidence are those of the mean over heads or of the head; features have none.
    """
    shares = _shares(table)
    attention = {
        "confidence": table.confidence_score(),
        **{f"attention_{part}": table.attention_score(part) for part in ATTENTION_SCORES},
    }
    harmonic = harmonic_table(table)
    rows = []
    for s, step in enumerate(table.steps):
        for n, layer in enumerate(table.layers):
            for r, reading in enumerate(table.readings):
                of_heads = r <= table.heads
                row = {"step": step, "timestep": table.timesteps[s], "layer": layer, "reading": reading}
                row["head"] = r - 1 if 0 < r <= table.heads else None
                row["cases"], row["moving_cases"] = int(table.cases[s, n, r]), int(table.moving_cases[s, n, r])
                row |= {name: _number(values[s, n, r]) for name, values in shares.items()}
                row |= {name: _number(values[s, n, r]) if of_heads else None for name, values in attention.items()}
                row["harmonic_mean"] = None if harmonic is None or r else _number(harmonic[s, n])
                rows.append(row)
    return rows


def video_rows(results: AnalysisResults, choice: Calibration) -> list[dict[str, object]]:
    """Figures of every video at the chosen reading, broken ones with their reason."""
    rows: list[dict[str, object]] = []
    r = 0 if choice.best.head is None else 1 + choice.best.head
    for name, table in results.tables.items():
        place = (table.steps.index(choice.best.step), table.layers.index(choice.best.layer), r)
        counted = {"cases": int(table.cases[place]), "moving_cases": int(table.moving_cases[place])}
        shares = {column: _number(values[place]) for column, values in _shares(table).items()}
        rows.append({"video": name, "error": "", **counted, **shares})
    empty = dict.fromkeys(rows[0]) if rows else {}
    return rows + [{**empty, "video": name, "error": error} for name, error in results.failures.items()]


def _shares(table: AnalysisTable) -> dict[str, np.ndarray]:
    """Accuracies `[S, L, R]` by column."""
    return {
        f"{kind}pck_{threshold:g}px": table.accuracy(threshold, moving=bool(kind))
        for kind in ("", "moving_")
        for threshold in table.thresholds
    }


def write_parquet(path: str | os.PathLike[str], rows: list[dict[str, object]]) -> None:
    """Write rows as Parquet.

    Raises:
        ImportError: pyarrow is not installed.
    """
    require_pyarrow()
    import pyarrow
    from pyarrow import parquet

    with written_beside(path) as file:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def require_pyarrow() -> None:
    """Raises ImportError, with what to do, where Parquet cannot be written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("Parquet tables need pyarrow, which is not installed; pip install pyarrow, or take CSV alone")


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
