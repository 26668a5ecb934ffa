"""Figures, tables and pictures through a trainer's own loggers, and as files beside their logs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corrdit.files import written_beside

FOLDER = "correspondence"
"""Beginning of the names of what is logged, and folder of its files, unless a callback is given another."""


def report_name(name: str) -> str:
    """A name that can begin others and be a folder.

    Raises:
        ValueError: it cannot.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"name must be a word of letters, digits, '_', '-' and '.', got {name!r}")
    return name


def check_names_differ(callback: Any, trainer: Any) -> None:
    """Raises ValueError where another callback of this class would write over what this one logs."""
    for other in trainer.callbacks:
        if other is not callback and isinstance(other, type(callback)) and other.name == callback.name:
            raise ValueError(
                f"two {type(callback).__name__} log under the name {callback.name!r}, so one would write over the "
                "other; give each its own name="
            )


def log_figures(trainer: Any, figures: Mapping[str, float], step: int) -> None:
    """Numbers by name to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics({name: value for name, value in figures.items() if not math.isnan(value)}, step=step)


def log_table(trainer: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> Path:
    """A table to every logger that takes tables, and as CSV.

    Weights and Biases gets a table, TensorBoard a text in Markdown.

    Args:
        trainer: the Trainer; call on the first process only.
        name: of the table, `FOLDER/REST`; its file is in that folder.
        rows: column by name, the same columns in each.
        step: of training.

    Returns:
        The CSV file, in the folder of the name beside the logs.
    """
    columns = list(rows[0])
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key=name, columns=columns, data=[list(row.values()) for row in rows], step=step)
        elif hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text(name, _markdown(columns, rows), step)
    path = _report_file(trainer, name, f"_{step:06}.csv")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with written_beside(path, "w") as file:
        file.write(text.getvalue())
    return path


def log_picture(trainer: Any, name: str, picture: np.ndarray, step: int) -> Path:
    """A picture uint8 `[H, W, 3]` to every logger that takes pictures, and as PNG; the rest as `log_table`."""
    import imageio.v3 as imageio

    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=step)
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
    path = _report_file(trainer, name, f"_{step:06}.png")
    with written_beside(path) as file:
        file.write(imageio.imwrite("<bytes>", picture, extension=".png"))
    return path


def _report_file(trainer: Any, name: str, ending: str) -> Path:
    """`FOLDER/REST` as a file in FOLDER, beside the first logger's files or in the trainer's root folder."""
    beginning, _, rest = name.partition("/")
    logs = next((logger.log_dir or logger.save_dir for logger in trainer.loggers), None)
    folder = Path(logs or trainer.default_root_dir) / beginning
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (rest.replace("/", "_") + ending)


def draw_heatmap(table: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str) -> np.ndarray:
    """A table of numbers, `[rows, columns]`, NaN left blank, as a picture uint8 `[H, W, 3]`."""
    figure = _figure(max(4.0, 2.0 + 0.6 * len(columns)), max(2.5, 1.4 + 0.32 * len(rows)))
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for row, column in np.argwhere(~np.isnan(table)) if table.size <= 200 else ():
        axes.text(column, row, f"{table[row, column]:.2f}", ha="center", va="center", color="w", fontsize=7)
    axes.set_title(title)
    figure.colorbar(image, ax=axes)
    return _pixels(figure)


def draw_matches(
    match_xy: Mapping[str, np.ndarray], title: str, most_frames: int = 6, most_rows: int = 12
) -> np.ndarray:
    """Where tokens go: each token of the source frame has a colour by the place of its match.

    Args:
        match_xy: `[F - 1, h, w, 2]` by the name of a row, in tokens.
        title: over the picture.
        most_frames: target frames shown, evenly chosen.
        most_rows: entries shown, evenly chosen.

    Returns:
        uint8 `[H, W, 3]`; one row for each entry, the first column with the colours of the source frame itself.
    """
    from corrdit.visualization import position_colours

    frames, height, width = next(iter(match_xy.values())).shape[:3]
    shown = _evenly(frames, most_frames)
    match_xy = {name: match_xy[name] for name in np.array(list(match_xy))[_evenly(len(match_xy), most_rows)]}
    own = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    colours = position_colours(own.reshape(-1, 2), height, width).reshape(height, width, 3)
    figure = _figure(1.2 * (len(shown) + 1) + 1.0, (1.2 * height / width + 0.25) * len(match_xy) + 0.8)
    grid = figure.subplots(len(match_xy), len(shown) + 1, squeeze=False)
    for row, (name, xy) in zip(grid, match_xy.items(), strict=True):
        for axes, places in zip(row, [own, *xy[shown]], strict=True):
            column, line = np.round(places).astype(int).transpose(2, 0, 1)
            axes.imshow(colours[line.clip(0, height - 1), column.clip(0, width - 1)])
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(name, fontsize=8)
    for axes, label in zip(grid[0], ["source", *(f"target {index + 1}" for index in shown)], strict=True):
        axes.set_title(label, fontsize=7)
    figure.suptitle(title, fontsize=9)
    return _pixels(figure)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _markdown(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
