"""Curves over timesteps, in the order they are passed: noise on the left, the clean video on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

_INK = "#3a4048"
_COLOURS = ("#2a6fbb", "#e4572e", "#3f9b5b", "#8b5fbf", "#c08a1e", "#3aa6a6", "#b5487d", "#6b7580")
_DPI = 110
MOST_CURVES = len(_COLOURS)


def draw_curves(
    x: Sequence[float],
    curves: Mapping[str, np.ndarray],
    *,
    title: str,
    x_title: str,
    y_title: str,
    percent: bool = True,
    reference: tuple[str, float] | None = None,
) -> np.ndarray:
    """Draw several curves with direct labels, the first x on the left.

    Args:
        x: places of the points.
        curves: at most `MOST_CURVES` rows of values, by label; NaN leaves a gap.
        title, x_title, y_title: what is shown.
        percent: whether values are shares, which are written as percentages.
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), dpi=_DPI, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axis = figure.subplots()
    factor = 100 if percent else 1
    for colour, (label, values) in zip(_COLOURS, curves.items(), strict=False):
        marker = "o" if len(x) <= 30 else None
        axis.plot(x, factor * np.asarray(values), color=colour, label=label, linewidth=1.8, marker=marker, markersize=4)
    if reference is not None:
        axis.axhline(factor * reference[1], color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=reference[0])
    if x[0] > x[-1]:
        axis.invert_xaxis()
    axis.set_title(title, color=_INK, fontsize=10, loc="left")
    axis.set_xlabel(x_title, color=_INK, fontsize=9)
    axis.set_ylabel(f"{y_title} (%)" if percent else y_title, color=_INK, fontsize=9)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=_INK)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
