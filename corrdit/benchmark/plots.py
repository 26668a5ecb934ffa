"""Pictures of benchmark rows: time and memory against tokens, and the share of the device's limit."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from corrdit.benchmark.comparisons import COMPARISONS
from corrdit.benchmark.report import largest_shape
from corrdit.benchmark.runner import BOTH, FORWARD, Row
from corrdit.files import written_beside

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = {FORWARD: "forward", BOTH: "forward-backward"}
# Colours of Okabe and Ito, which stay apart for the colour-blind; shapes of the marks for print without colour.
_WAYS = {
    "corrdit": ("#0072B2", "o"),
    "materialized": ("#D55E00", "s"),
    "folded-chunks": ("#009E73", "^"),
    "sdpa": ("#CC79A7", "D"),
    "flex": ("#E69F00", "v"),
    "compiled": ("#56B4E9", "P"),
    "windows": ("#000000", "X"),
    "folded-compiled": ("#009E73", "<"),
    "folded-autotuned": ("#009E73", ">"),
    "sdpa-flash": ("#CC79A7", "p"),
    "sdpa-cudnn": ("#CC79A7", "8"),
    "flash-3": ("#882255", "*"),
    "flex-flash": ("#E69F00", "d"),
    "corrdit triton": ("#0072B2", "H"),
    "corrdit streaming": ("#7F7F7F", "h"),
    "corrdit reference": ("#332288", "p"),
}
_UNKNOWN = ("#7F7F7F", "x")
_TEXT = 9
_SPREAD = 0.6
"""Share of a line's height over which its marks are spread."""


class _Quantity(NamedTuple):
    """What is drawn against tokens, and the line below which it cannot fall."""

    name: str
    label: str
    value: Callable[[Row], float]
    floor: Callable[[Row], float] | None


_TIME = _Quantity(
    "Time", "milliseconds", lambda row: row["milliseconds"]["median"], lambda row: row["floor_milliseconds"]
)
_MEMORY = _Quantity("Memory", "MiB beyond inputs and outputs", lambda row: max(row["extra_bytes"], 2**10) / 2**20, None)


def write_plots(rows: Sequence[Row], folder: pathlib.Path) -> list[pathlib.Path]:
    """`time-*.png` and `memory-*.png` for each pass that was timed, and `limit.png`."""
    paths = []
    for passes, name in FILES.items():
        here = [row for row in rows if row["pass"] == passes]
        if not any("milliseconds" in row for row in here):
            continue
        for quantity in (_TIME, _MEMORY):
            path = folder / f"{quantity.name.lower()}-{name}.png"
            _write_against_tokens(here, passes, quantity, path)
            paths.append(path)
    if paths:
        paths.append(folder / "limit.png")
        _write_limits(rows, paths[-1])
    return paths


def _write_against_tokens(rows: Sequence[Row], passes: str, quantity: _Quantity, path: pathlib.Path) -> None:
    """A panel for each operation, all with the same axes; one legend for all, in a free panel where there is one."""
    from matplotlib.figure import Figure

    operations = [name for name in COMPARISONS if any(row["operation"] == name for row in rows)]
    columns = min(3 if len(operations) in (3, 5, 6, 9) else 4, len(operations))
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(0.8 + 2.9 * columns, 0.6 + 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    handles: dict[str, Artist] = {}
    for number, (axis, operation) in enumerate(zip(axes, operations, strict=False)):
        here = [row for row in rows if row["operation"] == operation]
        _draw_panel(axis, here, quantity, handles)
        axis.set_title(operation, fontsize=_TEXT)
        if number + columns >= len(operations):
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("video tokens", fontsize=_TEXT)
        if number % columns == 0:
            axis.set_ylabel(quantity.label, fontsize=_TEXT)
    for axis in axes[len(operations) :]:
        axis.set_axis_off()
    figure.suptitle(f"{quantity.name}, {passes}\n{_caption(rows)}", fontsize=_TEXT + 1)
    _draw_legend(figure, axes[len(operations)] if len(axes) > len(operations) else None, handles)
    _save(figure, path)


def _draw_legend(figure: Figure, free_panel: Axes | None, handles: dict[str, Artist]) -> None:
    order = [name for name in _WAYS if name in handles] + [name for name in handles if name not in _WAYS]
    drawn = [handles[name] for name in order]
    if free_panel is None:
        figure.legend(drawn, order, loc="outside lower center", ncols=len(order), fontsize=_TEXT, frameon=False)
    else:
        free_panel.legend(drawn, order, loc="center", fontsize=_TEXT + 1, frameon=False)


def _draw_panel(axis: Axes, rows: Sequence[Row], quantity: _Quantity, handles: dict[str, Artist]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    axis.set_yscale("log")
    if quantity.floor is not None:
        own = [row for row in rows if row["competitor"].startswith("corrdit ")]
        _draw_lines(axis, own, quantity.floor, handles, "floor", color="#7F7F7F", linestyle="--", marker="_")
    for competitor in dict.fromkeys(row["competitor"] for row in rows):
        here = [row for row in rows if row["competitor"] == competitor]
        color, marker = _style(competitor)
        if competitor.startswith("corrdit "):
            look = {"markersize": 8, "linewidth": 2.6, "zorder": 2}
        else:
            look = {"markersize": 4.5, "linewidth": 1.1, "zorder": 3}
        timed = [row for row in here if "milliseconds" in row]
        _draw_lines(axis, timed, quantity.value, handles, _name(competitor), color=color, marker=marker, **look)
        for row in here:
            if row.get("status") == "out of memory":
                axis.plot(
                    _tokens(row), 0.96, color=color, marker="x", markersize=7, markeredgewidth=2, linestyle="none",
                    transform=axis.get_xaxis_transform(), zorder=4,
                )  # fmt: skip
                if "out of memory" not in handles:
                    handles["out of memory"] = axis.plot([], [], color="black", marker="x", linestyle="none")[0]
    axis.xaxis.set_major_locator(FixedLocator(_apart(sorted({_tokens(row) for row in rows}))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number / 1000:.3g}k"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.tick_params(labelsize=_TEXT - 1)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)


def _draw_lines(
    axis: Axes, rows: Sequence[Row], value: Callable[[Row], float], handles: dict[str, Artist], name: str, **look: Any
) -> None:
    for series in _series(rows):
        points = sorted((_tokens(row), value(row)) for row in series)
        drawn = axis.plot(*zip(*points, strict=True), **look)
        handles.setdefault(name, drawn[0])


def _series(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that may be joined by a line: they differ in the number of frames only."""
    series: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = tuple(value for name, value in row["shape"].items() if name not in ("name", "frames"))
        series.setdefault(key, []).append(row)
    return list(series.values())


def _apart(tokens: Sequence[int]) -> list[int]:
    """Those that have room for their labels on a logarithmic axis."""
    kept: list[int] = []
    for number in sorted(tokens, reverse=True):
        if not kept or number < 0.6 * kept[-1]:
            kept.append(number)
    return kept


def _write_limits(rows: Sequence[Row], path: pathlib.Path) -> None:
    """The share of the limit that every way reaches on the largest shape, an operation and pass in each line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shape = largest_shape(rows)
    timed = [row for row in rows if "milliseconds" in row and row["shape"]["name"] == shape.name]
    lines = [(name, p) for name in COMPARISONS for p in FILES if any(_line(row) == (name, p) for row in timed)]
    figure = Figure(figsize=(9.5, 1.6 + 0.4 * len(lines)), layout="constrained")
    axis = figure.subplots()
    handles: dict[str, Artist] = {}
    present = {_name(row["competitor"]) for row in timed}
    ways = [*(name for name in _WAYS if name in present), *sorted(present - _WAYS.keys())]
    for row in sorted(timed, key=lambda row: row["competitor"].startswith("corrdit ")):
        color, marker = _style(row["competitor"])
        own = row["competitor"].startswith("corrdit ")
        # Ways of nearly the same speed stand one above the other, in the order of the legend.
        height = lines.index(_line(row)) + _SPREAD * (
            ways.index(_name(row["competitor"])) / max(len(ways) - 1, 1) - 0.5
        )
        drawn = axis.plot(
            row["share_of_limit"], height, color=color, marker=marker, linestyle="none",
            markersize=7 if own else 6, zorder=3 if own else 2,
        )  # fmt: skip
        handles.setdefault(_name(row["competitor"]), drawn[0])
    bounds = {_line(row): row["bound"] for row in timed}
    passes = {FORWARD: "forward", BOTH: "both passes"}
    axis.set_yticks(range(len(lines)), [f"{name}, {passes[p]} ({bounds[name, p]})" for name, p in lines])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.set_xlim(right=max(1.15, 1.15 * max(row["share_of_limit"] for row in timed)))
    axis.axvline(1.0, color="black", linewidth=1)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("share of the device's measured limit (in brackets: which one)", fontsize=_TEXT)
    axis.tick_params(labelsize=_TEXT)
    axis.grid(axis="x", alpha=0.3)
    for line in range(0, len(lines), 2):
        axis.axhspan(line - 0.5, line + 0.5, color="black", alpha=0.04, linewidth=0)
    axis.set_axisbelow(True)
    figure.suptitle(f"{shape.name}: {shape.label}\n{_caption(timed)}", fontsize=_TEXT + 1)
    _draw_legend(figure, None, handles)
    _save(figure, path)


def _line(row: Row) -> tuple[str, str]:
    return row["operation"], row["pass"]


def _name(competitor: str) -> str:
    return "corrdit" if competitor == "corrdit auto" else competitor


def _style(competitor: str) -> tuple[str, str]:
    return _WAYS.get(_name(competitor), _UNKNOWN)


def _tokens(row: Row) -> int:
    shape = row["shape"]
    return int(shape["frames"] * shape["height"] * shape["width"])


def _caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    commits = ", ".join(dict.fromkeys(str(row["commit"]) for row in rows))
    return f"{first['device']}, {first['dtype']}, torch {first['torch']}, commit {commits}"


def _save(figure: Figure, path: pathlib.Path) -> None:
    with written_beside(path) as file:
        figure.savefig(file, format="png", dpi=120)
