"""Figures, tables and pictures through a trainer's own loggers, and as files beside their logs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from lightning.pytorch import Trainer

from corrdit.files import write_csv, written_beside
from corrdit.integrations.lightning.reading import BatchCallback
from corrdit.visualization.charts import draw_heatmaps
from corrdit.visualization.colours import position_colours
from corrdit.visualization.figures import figure_pixels, png_bytes

Column = TypeVar("Column", int, str)
FOLDER = "correspondence"
"""Beginning of the names of what is logged, and folder of its files, unless a callback is given another."""


class ReportingCallback(BatchCallback):
    """A callback that logs under a name of its own.

    Args:
        name: begins the names of what it logs, and is the folder of its files.

    Raises:
        ValueError: a name that can be neither.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"name must be a word of letters, digits, '_', '-' and '.', got {name!r}")
        self.name = name

    def refuse_shared_name(self, trainer: Trainer) -> None:
        """Raises ValueError where another callback of this class would write over what this one logs."""
        for other in trainer.callbacks:
            if other is not self and isinstance(other, type(self)) and other.name == self.name:
                raise ValueError(
                    f"two {type(self).__name__} log under the name {self.name!r}, so one would write over the other; "
                    "give each its own name="
                )


def log_figures(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Numbers by name to every logger."""
    for logger in trainer.loggers:
        known = {name: value for name, value in figures.items() if not math.isnan(value)}
        logger.log_metrics(known, step=trainer.global_step)


def log_table(trainer: Trainer, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A table to every logger that takes tables, and as CSV in the folder of its name beside the logs.

    Weights and Biases gets a table, TensorBoard a text in Markdown.

    Args:
        trainer: the Trainer; call on the first process only.
        name: of the table, `FOLDER/REST`; its file is in that folder.
        rows: column by name, the same columns in each.
    """
    columns, step = list(rows[0]), trainer.global_step
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            logger.log_table(key=name, columns=columns, data=[list(row.values()) for row in rows], step=step)
        elif hasattr(logger.experiment, "add_text"):
            logger.experiment.add_text(name, _markdown(columns, rows), step)
    write_csv(_report_file(trainer, name, "csv"), rows)


def log_picture(trainer: Trainer, name: str, picture: np.ndarray) -> None:
    """A picture uint8 `[H, W, 3]` to every logger that takes pictures, and as PNG; the rest as `log_table`."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=trainer.global_step)
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(name, picture, trainer.global_step, dataformats="HWC")
    with written_beside(_report_file(trainer, name, "png")) as file:
        file.write(png_bytes(picture))


def _report_file(trainer: Trainer, name: str, kind: str) -> Path:
    """`FOLDER/REST` as a file in FOLDER, beside the first logger's files or in the trainer's root folder."""
    beginning, _, rest = name.partition("/")
    logs = next((logger.log_dir or logger.save_dir for logger in trainer.loggers), None)
    folder = Path(logs or trainer.default_root_dir) / beginning
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{rest.replace('/', '_')}_{trainer.global_step:06}.{kind}"


def draw_by_layer(values: Mapping[tuple[int, Column], float], title: str, column_title: str) -> np.ndarray:
    """Figures by (layer, column) as a picture uint8 `[H, W, 3]`; columns in the order they come, missing ones grey."""
    layers = sorted({layer for layer, _ in values})
    columns = list(dict.fromkeys(column for _, column in values))
    table = np.array([[values.get((layer, column), np.nan) for column in columns] for layer in layers])
    return draw_heatmaps(
        {title: table}, rows=layers, columns=columns, row_title="layer", column_title=column_title, percent=False
    )


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
    from matplotlib.figure import Figure

    frames, height, width = next(iter(match_xy.values())).shape[:3]
    shown = _evenly(frames, most_frames)
    match_xy = {name: match_xy[name] for name in np.array(list(match_xy))[_evenly(len(match_xy), most_rows)]}
    own = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1)
    colours = position_colours(own.reshape(-1, 2), height, width).reshape(height, width, 3)
    size = (1.2 * (len(shown) + 1) + 1.0, (1.2 * height / width + 0.25) * len(match_xy) + 0.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
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
    return figure_pixels(figure)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the indices below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _markdown(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
