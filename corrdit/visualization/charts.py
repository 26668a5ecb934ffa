"""Heatmaps of a number over two axes, such as layer and timestep, and curves over timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from corrdit.visualization.figures import INK, figure_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.image import AxesImage

_MISSING = "#e3e6ea"
_MOST_LABELS = 24
_MOST_NUMBERS = 160
_MOST_DECIMALS = 3
_DPI = 110
_COLOURS = ("#2a6fbb", "#e4572e", "#3f9b5b", "#8b5fbf", "#c08a1e", "#3aa6a6", "#b5487d", "#6b7580")
MOST_CURVES = len(_COLOURS)


def draw_heatmaps(
    panels: Mapping[str, np.ndarray],
    *,
    rows: Sequence[object],
    columns: Sequence[object],
    row_title: str,
    column_title: str,
    percent: bool = True,
) -> np.ndarray:
    """Draw tables as colours on one scale, so that they compare; the largest entry of each is framed.

    Args:
        panels: values `[len(rows), len(columns)]` by title; NaN is drawn grey.
        rows, columns: labels of the entries.
        row_title, column_title: of the axes.
        percent: whether values are shares, which are written as percentages.

    Returns:
        uint8 `[h, w, 3]`.

    Raises:
        ValueError: no panel, or a table that does not fit the labels.
    """
    if not panels:
        raise ValueError("there is no table to draw: panels is empty")
    for title, values in panels.items():
        if np.shape(values) != (len(rows), len(columns)):
            raise ValueError(
                f"{title} has shape {np.shape(values)}, which does not fit {len(rows)} rows and {len(columns)} columns"
            )
    from matplotlib.figure import Figure

    factor = 100 if percent else 1
    tables = {title: factor * np.asarray(values, dtype=np.float64) for title, values in panels.items()}
    side_by_side = min(len(tables), 3 if len(columns) <= 16 and len(tables) != 4 else 2)
    down = -(-len(tables) // side_by_side)
    width = min(6.0, max(3.4, 0.42 * len(columns) + 1.6))
    height = min(7.0, max(2.2, 0.32 * len(rows) + 1.3))
    figure = Figure(figsize=(width * side_by_side, height * down), dpi=_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(down, side_by_side, squeeze=False)
    limits = _limits(np.stack(list(tables.values())))
    for place, (title, table) in enumerate(tables.items()):
        axis = axes[place // side_by_side, place % side_by_side]
        image = _panel(axis, table, title, limits, rows, columns, percent)
        axis.set_xlabel(column_title, color=INK, fontsize=9)
        axis.set_ylabel(row_title, color=INK, fontsize=9)
    scale = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, format="%g %%" if percent else "%g")
    scale.ax.tick_params(labelsize=7)
    for place in range(len(tables), down * side_by_side):
        axes[place // side_by_side, place % side_by_side].set_axis_off()
    return figure_pixels(figure)


def _panel(
    axis: Axes,
    table: np.ndarray,
    title: str,
    limits: tuple[float, float],
    rows: Sequence[object],
    columns: Sequence[object],
    percent: bool,
) -> AxesImage:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    palette = colormaps["viridis"].with_extremes(bad=_MISSING)
    image = axis.imshow(np.ma.masked_invalid(table), cmap=palette, vmin=limits[0], vmax=limits[1], aspect="auto")
    axis.set_title(title, color=INK, fontsize=10, loc="left")
    _ticks(axis.xaxis, columns)
    _ticks(axis.yaxis, rows)
    axis.tick_params(labelsize=8, colors=INK, length=2)
    for spine in axis.spines.values():
        spine.set_visible(False)
    if table.size <= _MOST_NUMBERS:
        middle, decimals = sum(limits) / 2, 1 if percent else _decimals(limits)
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                ink = "white" if value < middle else "black"
                label = f"{value:.{decimals}f}"
                axis.text(column, row, label, ha="center", va="center", fontsize=7, color=ink)
    if np.isfinite(table).any():
        row, column = np.unravel_index(np.nanargmax(table), table.shape)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#e4572e", linewidth=2))
    return image


def _ticks(axis: Axis, labels: Sequence[object]) -> None:
    step = -(-len(labels) // _MOST_LABELS)
    axis.set_ticks(range(0, len(labels), step), labels=[str(label) for label in labels[::step]])


def _decimals(limits: tuple[float, float]) -> int:
    """How many every number of a table gets, so that the largest has three figures."""
    largest = max(map(abs, limits))
    return min(max(2 - math.floor(math.log10(largest)), 0), _MOST_DECIMALS) if largest else _MOST_DECIMALS


def _limits(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def draw_curves(
    x: Sequence[float],
    curves: Mapping[str, np.ndarray],
    *,
    title: str,
    x_title: str,
    y_title: str,
    reference: tuple[str, float] | None = None,
) -> np.ndarray:
    """Draw several curves with direct labels, the first x on the left: noise, and the clean video on the right.

    Args:
        x: places of the points.
        curves: at most `MOST_CURVES` rows of values, by label; NaN leaves a gap.
        title, x_title, y_title: what is shown; values are shares, which are written as percentages.
        reference: label and value of a dashed level to compare with.

    Returns:
        uint8 `[h, w, 3]`.

    Raises:
        ValueError: no curve, too many, or one that does not fit x.
    """
    if not 1 <= len(curves) <= MOST_CURVES:
        raise ValueError(f"{len(curves)} curves were given; accepted are 1 to {MOST_CURVES}, more cannot be told apart")
    for label, values in curves.items():
        if np.shape(values) != (len(x),):
            raise ValueError(f"{label} has shape {np.shape(values)}; {len(x)} values are needed, one for each x")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), dpi=_DPI, layout="constrained", facecolor="white")
    axis = figure.subplots()
    for colour, (label, values) in zip(_COLOURS, curves.items(), strict=False):
        marker = "o" if len(x) <= 30 else None
        axis.plot(x, 100 * np.asarray(values), color=colour, label=label, linewidth=1.8, marker=marker, markersize=4)
    if reference is not None:
        axis.axhline(100 * reference[1], color=INK, linewidth=1, linestyle=(0, (4, 3)), label=reference[0])
    if x[0] > x[-1]:
        axis.invert_xaxis()
    axis.set_title(title, color=INK, fontsize=10, loc="left")
    axis.set_xlabel(x_title, color=INK, fontsize=9)
    axis.set_ylabel(f"{y_title} (%)", color=INK, fontsize=9)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    return figure_pixels(figure)
