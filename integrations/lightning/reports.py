"""Figures, tables and pictures through a trainer's own loggers, and as files beside their logs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from lightning.pytorch import Trainer

from corrdit.files import markdown_table, write_csv, written_beside
from corrdit.integrations.lightning.reading import BatchCallback
from corrdit.visualization.charts import draw_heatmaps
from corrdit.visualization.colours import position_colours
from corrdit.visualization.figures import figure_pixels, png_bytes
from corrdit.visualization.sheet import sheet_frames

Column = TypeVar("Column", int, str)
SHOWN_FRAMES = 6
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


class Report:
    """The table and the pictures of one run of a stage, under names that no earlier run has.

    A second run at the same step of training, or into the same folder, is `-v1`, the next `-v2`, as with Lightning's
    checkpoints, in the names of its files and in the keys that loggers get.

    Args:
        trainer: the Trainer; make reports on the first process only.
        name: of the table, `FOLDER/REST`; files are in that folder, beside the first logger's files or in the Trainer's
            root folder, and end in the step of training.
    """

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer, self.name, self.version = trainer, name, ""
        runs = 0
        while self._file(name, "csv").exists():
            runs += 1
            self.version = f"-v{runs}"

    def table(self, rows: Sequence[Mapping[str, object]]) -> None:
        """A table to every logger that takes tables, and as CSV.

        Weights and Biases gets a table, TensorBoard a text in Markdown.

        Args:
            rows: column by name, the same columns in each.
        """
        columns, step, key = list(rows[0]), self.trainer.global_step, self.name + self.version
        for logger in self.trainer.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table(key=key, columns=columns, data=[list(row.values()) for row in rows], step=step)
            elif hasattr(logger.experiment, "add_text"):
                cells = [
                    [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
                    for row in rows
                ]
                logger.experiment.add_text(key, markdown_table(columns, cells), step)
        write_csv(self._file(self.name, "csv"), rows)

    def picture(self, name: str, picture: np.ndarray) -> None:
        """A picture uint8 `[H, W, 3]` to every logger that takes pictures, and as PNG; `name` follows the table's."""
        name = f"{self.name}/{name}"
        step, key = self.trainer.global_step, name + self.version
        for logger in self.trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image(key=key, images=[picture], step=step)
            elif hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(key, picture, step, dataformats="HWC")
        with written_beside(self._file(name, "png")) as file:
            file.write(png_bytes(picture))

    def _file(self, name: str, kind: str) -> Path:
        beginning, _, rest = name.partition("/")
        logs = next((logger.log_dir or logger.save_dir for logger in self.trainer.loggers), None)
        folder = Path(logs or self.trainer.default_root_dir) / beginning
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{rest.replace('/', '_')}_{self.trainer.global_step:06}{self.version}.{kind}"


def draw_by_layer(values: Mapping[tuple[int, Column], float], title: str, column_title: str) -> np.ndarray:
    """Figures by (layer, column) as a picture uint8 `[H, W, 3]`; columns in the order they come, missing ones grey."""
    layers = sorted({layer for layer, _ in values})
    columns = list(dict.fromkeys(column for _, column in values))
    table = np.array([[values.get((layer, column), np.nan) for column in columns] for layer in layers])
    return draw_heatmaps(
        {title: table}, rows=layers, columns=columns, row_title="layer", column_title=column_title, percent=False
    )


def draw_matches(match_xy: Mapping[str, np.ndarray], title: str, most_rows: int = 12) -> np.ndarray:
    """Where tokens go: each token of the source frame has a colour by the place of its match.

    Args:
        match_xy: `[F - 1, h, w, 2]` by the name of a row, in tokens.
        title: over the picture.
        most_rows: entries shown, evenly chosen.

    Returns:
        uint8 `[H, W, 3]`; one row for each entry, the first column with the colours of the source frame itself.
    """
    from matplotlib.figure import Figure

    frames, height, width = next(iter(match_xy.values())).shape[:3]
    shown, names = sheet_frames(frames, SHOWN_FRAMES), list(match_xy)
    match_xy = {names[row]: match_xy[names[row]] for row in sheet_frames(len(names), most_rows)}
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
