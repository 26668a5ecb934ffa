"""The report of an analysis: what matches best, every table as a picture, and the tables as CSV and Parquet beside."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from corrdit.analysis.calibration import FEW_VIDEOS, Calibration
from corrdit.analysis.protocols import FEATURE_READINGS
from corrdit.analysis.results import AnalysisResults
from corrdit.analysis.table import MEAN, PARTS, STANDING_STILL, AnalysisTable
from corrdit.files import write_csv, written_beside
from corrdit.metrics.harmonic import harmonic_mean
from corrdit.visualization.charts import draw_curves, draw_heatmaps
from corrdit.visualization.page import ReportPage

REPORT_FILE = "report.html"
CSV_FILE = "analysis.csv"
VIDEOS_CSV_FILE = "videos.csv"
PARQUET_FILE = "analysis.parquet"
PUBLISHED_ROUNDING = (
    "Published figures come from runs in bfloat16 with a second softmax over the cost, where near candidates tie; "
    "figures to stand beside them are made with --rounding bfloat16."
)
Picture = tuple[str, np.ndarray, str]
"""Section, pixels and caption."""


def write_report(
    output: str | os.PathLike[str],
    results: AnalysisResults,
    *,
    pictures: Sequence[Picture] = (),
    parquet: bool = False,
    made_with: Mapping[str, object] | None = None,
) -> list[str]:
    """Write report.html, analysis.csv and videos.csv (and analysis.parquet) from the results of videos.

    Args:
        output: an existing folder.
        results: as `corrdit.analysis.results.read_results` gives them.
        pictures: further ones, by section.
        parquet: also write Parquet.
        made_with: what the report says of its making, such as command, version, commit and device.

    Returns:
        Names of the files.

    Raises:
        ValueError: no video has a result.
        ImportError: Parquet without pyarrow.
    """
    folder, table = Path(output), results.total()
    rows = table_rows(table)
    files = [CSV_FILE, VIDEOS_CSV_FILE]
    write_csv(folder / CSV_FILE, rows)
    if parquet:
        write_parquet(folder / PARQUET_FILE, rows)
        files.append(PARQUET_FILE)
    choice = results.calibration()
    write_csv(folder / VIDEOS_CSV_FILE, video_rows(results, choice))
    page = ReportPage(f"Correspondence in {results.settings.get('model', 'a video transformer')}")
    _findings(page, results, table, choice)
    _matching(page, table, choice)
    _heads(page, table, choice)
    _attention(page, table)
    section = ""
    for title, pixels, caption in pictures:
        if title != section:
            page.section(title)
            section = title
        page.picture(pixels, caption)
    _record(page, results, files, made_with or {})
    page.write(folder / REPORT_FILE)
    return [REPORT_FILE, *files]


def _findings(page: ReportPage, results: AnalysisResults, table: AnalysisTable, choice: Calibration) -> None:
    page.text(f"Best: {choice.described()}.", kind="lead")
    kind = "visible points that moved" if choice.moving else "all visible points; none moved far"
    page.text(_counted(table, results.settings.get("options", {}).get("least_motion", 0), kind))
    if results.failures:
        page.text(f"{len(results.failures)} videos could not be analysed and are in no number here:", kind="problem")
        page.table(["video", "reason"], [[name, error] for name, error in results.failures.items()])
    if len(results.tables) < FEW_VIDEOS:
        page.text(f"{len(results.tables)} videos are few; the order of near readings may be chance.", kind="problem")
    columns = ["reading", "layer", "timestep", *(f"{limit:g} px" for limit in table.thresholds)]
    all_points = [f"{limit:g} px, all points" for limit in table.thresholds]
    heads = [] if choice.single is None else [f"query-key head {choice.single.head}"]
    filtered = [f"query-key low-pass {spread:g}" for spread in table.low_pass]
    compared = [MEAN, *heads, *filtered, *(FEATURE_READINGS if table.features else ()), STANDING_STILL]
    rows = [_threshold_row(table, reading, choice) for reading in compared]
    page.section("Points within each distance")
    page.table([*columns, *all_points], rows)
    page.text("Percent; pixels of the encoded frames. Each reading is shown where it is best at the main distance.")


def _counted(table: AnalysisTable, least_motion: float, kind: str) -> str:
    """What the figures are shares of."""
    token = (
        f"A token spans {table.stride[1]} x {table.stride[0]} pixels. Shares below are of {kind} unless said otherwise"
    )
    moved = f"of points that moved by more than {least_motion:g} tokens"
    if table.of_videos:
        return (
            f"Every figure is the mean of {table.videos} videos' own figures, of which "
            f"{int(table.moving_cases.max())} have positions {moved}; confidence is over all points, 0 for one that is "
            f"never shown (DiffTrack's released way). {token}. {PUBLISHED_ROUNDING}"
        )
    return (
        f"{table.videos} videos, {int(table.cases.max())} positions of visible points in later frames, "
        f"{int(table.moving_cases.max())} of them {moved}, pooled over the videos. {token}."
    )


def _threshold_row(table: AnalysisTable, reading: str, choice: Calibration) -> list[object]:
    r = table.readings.index(reading)
    values = np.nan_to_num(table.accuracy(choice.threshold, moving=choice.moving)[..., r], nan=-1.0)
    s, n = np.unravel_index(values.argmax(), values.shape)
    shares = [
        100 * float(table.accuracy(threshold, moving=moving)[s, n, r])
        for moving in (choice.moving, False)
        for threshold in table.thresholds
    ]
    cells = [round(share, 1) if np.isfinite(share) else None for share in shares]
    still = reading == STANDING_STILL
    return [reading, "any" if still else str(table.layers[n]), "any" if still else f"{table.timesteps[s]:g}", *cells]


def _matching(page: ReportPage, table: AnalysisTable, choice: Calibration) -> None:
    accuracy = table.accuracy(choice.threshold, moving=choice.moving)
    readings = [MEAN, *(FEATURE_READINGS if table.features else ())]
    page.section("Matching by layer and timestep")
    page.picture(
        _by_layer_and_step(table, {name: accuracy[..., table.readings.index(name)] for name in readings}),
        f"Points found within {choice.threshold:g} px by query-key matching (mean over heads) and by features: the "
        "attention output with heads joined, before its projection, and after it. The best cell is framed.",
    )
    if len(table.steps) == 1:  # a curve of one point says nothing beyond the table
        return
    shown = list(dict.fromkeys([*choice.layers[:4], choice.best.layer]))
    still = float(accuracy[0, 0, table.readings.index(STANDING_STILL)])
    curves = {f"layer {layer}": accuracy[:, table.layers.index(layer), 0] for layer in shown}
    for name in readings[1:]:
        best = int(np.nanargmax(np.nan_to_num(accuracy[..., table.readings.index(name)], nan=-1.0).max(0)))
        curves[f"{name}, layer {table.layers[best]}"] = accuracy[:, best, table.readings.index(name)]
    page.picture(
        _by_timestep(table, curves, f"Points found within {choice.threshold:g} px", reference=(STANDING_STILL, still)),
        "The best layers by query-key matching, and the best layer of each feature.",
    )


def _heads(page: ReportPage, table: AnalysisTable, choice: Calibration) -> None:
    if not table.heads or choice.single is None:
        return
    accuracy = table.accuracy(choice.threshold, moving=choice.moving)
    at = table.steps.index(choice.single.step)
    page.section("Heads")
    page.picture(
        draw_heatmaps(
            {f"timestep {choice.single.timestep:g}": accuracy[at, :, 1 : 1 + table.heads]},
            rows=table.layers,
            columns=range(table.heads),
            row_title="layer",
            column_title="head",
        ),
        f"Points found within {choice.threshold:g} px by the queries and keys of each head alone.",
    )
    if len(table.steps) == 1:
        return
    n = table.layers.index(choice.single.layer)
    order = np.argsort(-np.nan_to_num(accuracy[at, n, 1 : 1 + table.heads], nan=-1.0), kind="stable")[:5]
    curves = {"mean over heads": accuracy[:, n, 0]}
    curves |= {f"head {head}": accuracy[:, n, 1 + head] for head in order}
    page.picture(
        _by_timestep(table, curves, f"Layer {choice.single.layer}: points found within {choice.threshold:g} px"),
        "The heads of the layer that has the best single head, beside their mean.",
    )


def _attention(page: ReportPage, table: AnalysisTable) -> None:
    page.section("Confidence, attention and their harmonic mean with the accuracy")
    places = {"cross": "other frames", "own": "the own frame", "text": "the text"}
    for kind, score, caption in (
        (
            "confidence in",
            table.confidence_score,
            "The largest attention weight of a point in a later frame where it is visible, in its own frame and in the "
            "text, on average. Mean over heads.",
        ),
        ("attention on", table.attention_score, "Summed attention weight of a point, on average. Mean over heads."),
    ):
        panels = {f"{kind} {words}": score(part)[..., 0] for part, words in places.items()}
        page.picture(_by_layer_and_step(table, panels), caption)
    harmonic = harmonic_table(table)
    if harmonic is None:
        page.text(
            "The harmonic mean needs at least two layers or steps that differ in accuracy, confidence and attention."
        )
        return
    page.picture(
        _by_layer_and_step(table, {"harmonic mean": harmonic}, percent=False),
        "Harmonic mean of accuracy, confidence and cross-frame attention, each scaled from its smallest to its largest "
        "entry first (DiffTrack's criterion; relative, so it compares layers and timesteps of one model only).",
    )


def _record(page: ReportPage, results: AnalysisResults, files: Sequence[str], made_with: Mapping[str, object]) -> None:
    page.section("How it was made")
    page.links("Tables beside this page:", files)
    # The facts that a run is resumed by have parts of the preset a second time.
    settings = {name: value for name, value in results.settings.items() if not name.startswith("preset.")}
    page.table(["setting", "value"], list(_in_words({**made_with, **settings})))


def _in_words(settings: Mapping[str, object], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of settings; those inside others as "preset: layer", and what is not set left out."""
    for name, value in settings.items():
        title = f"{before}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _in_words(value, f"{title}: ")
        elif isinstance(value, (list, tuple)):
            if len(value):
                yield title, ", ".join(map(str, value))
        elif value is not None:
            yield title, ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _by_layer_and_step(table: AnalysisTable, panels: Mapping[str, np.ndarray], *, percent: bool = True) -> np.ndarray:
    """Heatmaps of values `[S, L]`."""
    return draw_heatmaps(
        {title: values.T for title, values in panels.items()},
        rows=table.layers,
        columns=[f"{timestep:.0f}" for timestep in table.timesteps],
        row_title="layer",
        column_title="timestep",
        percent=percent,
    )


def _by_timestep(
    table: AnalysisTable, curves: Mapping[str, np.ndarray], title: str, reference: tuple[str, float] | None = None
) -> np.ndarray:
    x_title = "timestep, from noise to the clean video"
    return draw_curves(table.timesteps, curves, title=title, x_title=x_title, y_title="share", reference=reference)


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

    `cases_are` says what is averaged: "positions" pooled over videos, or the figures of "videos" (DiffTrack's way).

    Attention and confidence are those of the mean over heads or of the head; features have none.
    """
    shares = _shares(table)
    attention = {
        "confidence": table.confidence_score(),
        **{f"confidence_{part}": table.confidence_score(part) for part in PARTS if part != "cross"},
        **{f"attention_{part}": table.attention_score(part) for part in PARTS},
    }
    harmonic = harmonic_table(table)
    rows = []
    for s, step in enumerate(table.steps):
        for n, layer in enumerate(table.layers):
            for r, reading in enumerate(table.readings):
                of_heads = r <= table.heads
                row = {"step": step, "timestep": table.timesteps[s], "layer": layer, "reading": reading}
                row["cases_are"] = "videos" if table.of_videos else "positions"
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
