"""Drawings of the embedded model's correspondence, from measured tables. Every function returns a Matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from experiment import Record
from matplotlib import colormaps, rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure

Readings = Mapping[str, Mapping[str, Mapping[str, float]]]
"""The `readings` of `matching_table`: by timestep and name of the reading."""

STYLE: Record = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7a828c",
    "axes.grid": False,
    "grid.color": "#e3e6ea",
    "text.color": "#23272d",
    "axes.labelcolor": "#23272d",
    "xtick.color": "#4a515a",
    "ytick.color": "#4a515a",
    "legend.frameon": False,
}
COLOURS = "viridis"
SHARE = "share found within one token"
KINDS = {"best head": "#31688e", "best layer": "#5ea8c9", "best features": "#e0a030", "patches": "#a8aeb6"}
KIND_NAMES = {
    "best head": "best head",
    "best layer": "best layer, mean over heads",
    "best features": "best features",
    "patches": "noisy patches",
}


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def layers_of(readings: Readings) -> int:
    """Number of layers that were read."""
    names = next(iter(readings.values()))
    return sum(name.startswith("query-key") and name.endswith("mean") for name in names)


def heads_of(readings: Readings) -> int:
    """Number of heads of a layer that were read."""
    names = next(iter(readings.values()))
    return sum(name.startswith("query-key 0 head") for name in names)


def layer_table(readings: Readings, pattern: str) -> np.ndarray:
    """Shares [layers, timesteps] of a reading whose name is `pattern` with the layer for {}."""
    layers = range(layers_of(readings))
    return np.array([[found[pattern.format(layer)]["share"] for found in readings.values()] for layer in layers])


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, position: f"{100 * value:.0f} %")


def _heat_panels(
    figure: Figure, tables: Mapping[str, np.ndarray], columns: Sequence[object], label: str, title: str, pad: float
) -> Figure:
    """Tables [layers, columns] by their titles side by side, in one scale."""
    highest = max(table.max() for table in tables.values())
    grid = np.atleast_1d(figure.subplots(1, len(tables), sharey=True))
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table, cmap=COLOURS, vmin=0, vmax=highest, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(table)), range(len(table)))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row, column in np.ndindex(table.shape):
            value = table[row, column]
            colour = "#23272d" if value > 0.62 * highest else "white"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8.5)
        axes.set_title(name)
        axes.set_xlabel(label)
    grid[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(grid), shrink=0.95, pad=pad)
    _percent(bar.ax.yaxis)
    bar.outline.set_visible(False)
    figure.suptitle(title)
    return figure


def draw_layers(readings: Readings, videos: int) -> Figure:
    """Layer x timestep: query-key and features side by side, in one scale."""
    tables = {
        "query-key, mean over heads": layer_table(readings, "query-key {} mean"),
        "features: attention output": layer_table(readings, "attention output {}"),
        "features: block output": layer_table(readings, "block output {}"),
    }
    title = f"Points that moved by more than 1.5 tokens: {SHARE} (%), {videos} held-out videos"
    with rc_context(STYLE):
        label = "timestep (0 is clean, 1000 is noise)"
        return _heat_panels(new_figure(13, 3.6), tables, list(readings), label, title, pad=0.01)


def draw_heads(readings: Readings, timesteps: Sequence[int]) -> Figure:
    """Layer x head at some timesteps, in one scale."""
    heads = range(heads_of(readings))
    tables = {
        f"t = {timestep}": np.concatenate(
            [layer_table({"": readings[str(timestep)]}, f"query-key {{}} head {head}") for head in heads], axis=1
        )
        for timestep in timesteps
    }
    with rc_context(STYLE):
        figure = new_figure(2.6 * len(tables) + 1.2, 3.6)
        return _heat_panels(figure, tables, heads, "head", f"Single heads: {SHARE} (%)", pad=0.02)


def draw_bars(panels: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Figure:
    """Best head, layer, features and patches with their intervals.

    panels: title -> the `summary` of a table, {timestep: {kind: share, low, high}}.
    """
    with rc_context(STYLE | {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True}):
        figure = new_figure(5.2 * len(panels) + 0.6, 3.9)
        grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for axes, (title, summary) in zip(grid, panels.items(), strict=True):
            for place, (kind, colour) in enumerate(KINDS.items()):
                rows = [found[kind] for found in summary.values()]
                shares = np.array([row["share"] for row in rows])
                reach = np.abs(np.array([[row["low"], row["high"]] for row in rows]).T - shares)
                where = np.arange(len(rows)) + 0.2 * (place - 1.5)
                axes.bar(where, shares, 0.18, color=colour, label=KIND_NAMES[kind])
                axes.errorbar(where, shares, yerr=reach, fmt="none", ecolor="#23272d", elinewidth=1, capsize=2)
                for x, share, above in zip(where, shares, reach[1], strict=True):
                    axes.text(x, share + above + 0.01, f"{100 * share:.0f}", ha="center", fontsize=8)
            axes.set_xticks(range(len(summary)), [f"t = {timestep}" for timestep in summary])
            axes.tick_params(axis="x", length=0)
            axes.set_title(title)
            _percent(axes.yaxis)
        grid[0].set_ylabel(SHARE)
        grid[-1].legend(loc="upper right", fontsize=9)
        grid[0].set_ylim(0, grid[0].get_ylim()[1] * 1.05)
    return figure


def draw_emergence(checkpoints: Sequence[Record]) -> Figure:
    """Matching accuracy of every layer, mean over heads, against training steps; dashed the noisy patches, dotted the
    best single head.

    checkpoints: rows with `step` and `shares`, {timestep: {reading: share}}.
    """
    steps = [row["step"] for row in checkpoints]
    timesteps = list(checkpoints[0]["shares"])
    names = list(checkpoints[0]["shares"][timesteps[0]])
    layers = sum(name.startswith("query-key") and name.endswith("mean") for name in names)
    colours = colormaps[COLOURS](np.linspace(0.0, 0.9, layers))
    with rc_context(STYLE | {"axes.grid": True}):
        figure = new_figure(3.9 * len(timesteps) + 1.6, 3.8)
        grid = np.atleast_1d(figure.subplots(1, len(timesteps), sharey=True))
        for axes, timestep in zip(grid, timesteps, strict=True):
            found = [row["shares"][timestep] for row in checkpoints]
            best = [max(share for name, share in row.items() if " head " in name) for row in found]
            axes.plot(steps, best, ":", color="#c0392b", linewidth=1.8, label="best head", zorder=5)
            for layer in reversed(range(layers)):
                curve = [row[f"query-key {layer} mean"] for row in found]
                axes.plot(steps, curve, "o-", color=colours[layer], markersize=3, label=f"layer {layer}")
            axes.plot(steps, [row["patches"] for row in found], "--", color="#7a828c", label="noisy patches")
            axes.set_title(f"t = {timestep}")
            axes.set_xlabel("training steps")
            axes.set_xlim(0, 1.02 * max(steps))
            _percent(axes.yaxis)
        grid[0].set_ylabel(SHARE)
        grid[0].set_ylim(bottom=0)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def draw_loss(loss: Mapping[str, Sequence[float]]) -> Figure:
    """Training loss, averaged over stretches of steps."""
    with rc_context(STYLE | {"axes.grid": True}):
        figure = new_figure(6, 3.4)
        axes = figure.subplots()
        axes.plot(loss["steps"], loss["loss"], color="#31688e", linewidth=1.6)
        axes.set_xlabel("training steps")
        axes.set_ylabel("mean squared error of the velocity")
        axes.set_xlim(left=0)
    return figure


def draw_samples(rows: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Figure:
    """Contact sheet: for each prompt the rendered video on the left and the generated one on the right.

    rows: prompt, rendered and generated video, uint8 [T, H, W, 3] each.
    """
    frames, height, width = rows[0][1].shape[:3]
    gap = max(1, width // 16)
    with rc_context(STYLE):
        figure = new_figure(14, (7 * height / width / frames * 0.97 + 0.2) * len(rows) + 0.15)
        grid = figure.subplots(len(rows), 2, squeeze=False)
        for line, (prompt, *videos) in zip(grid, rows, strict=True):
            for axes, video in zip(line, videos, strict=True):
                framed = np.pad(video, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
                axes.imshow(np.concatenate(list(framed), axis=1)[:, :-gap], interpolation="nearest")
                axes.set_axis_off()
            line[0].set_title(prompt, loc="left", fontsize=9, pad=3)
        for axes, title in zip(grid[0], ("rendered", "generated from the words"), strict=True):
            axes.annotate(
                title, (1, 1.03), xycoords="axes fraction", ha="right", va="bottom", fontsize=10, weight="bold"
            )
    return figure
