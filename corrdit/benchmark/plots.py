"""Pictures of benchmark rows: time and memory against tokens, and the share of the device's limit."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

from corrdit.benchmark.runner import Row
from corrdit.files import written_beside

_QUANTITIES: dict[str, tuple[str, Callable[[Row], float], bool]] = {
    "time": ("milliseconds", lambda row: row["milliseconds"]["median"], True),
    "memory": ("MiB beyond inputs and outputs", lambda row: max(row["extra_bytes"], 1) / 2**20, True),
    "limit": ("share of the measured matrix-product limit", lambda row: row["share_of_matmul_ceiling"], False),
}


def write_plots(rows: Sequence[Row], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """One PNG a quantity, a panel for each operation and pass: `<stem>-time.png`, `-memory.png`, `-limit.png`."""
    measured = [row for row in rows if "milliseconds" in row]
    if not measured:
        return []
    paths = []
    for quantity in _QUANTITIES:
        path = folder / f"{stem}-{quantity}.png"
        _write_plot(measured, quantity, path)
        paths.append(path)
    return paths


def _write_plot(rows: Sequence[Row], quantity: str, path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    label, value, logarithmic = _QUANTITIES[quantity]
    panels = sorted({(row["operation"], row["pass"]) for row in rows})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        chosen = [row for row in rows if (row["operation"], row["pass"]) == panel]
        for competitor in dict.fromkeys(row["competitor"] for row in chosen):
            points = sorted((_tokens(row), value(row)) for row in chosen if row["competitor"] == competitor)
            own = competitor.startswith("corrdit")
            axis.plot(*zip(*points, strict=True), marker="o", linewidth=2.5 if own else 1.2, label=competitor)
        axis.set(title=f"{panel[0]}: {panel[1]}", xlabel="video tokens", ylabel=label)
        axis.set_xscale("log")
        axis.set_yscale("log" if logarithmic else "linear")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    first = rows[0]
    figure.suptitle(
        f"{first['device']}, {first['dtype']}, torch {first['torch']}, commit {first['commit']}", fontsize=9
    )
    with written_beside(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _tokens(row: Row) -> int:
    shape = row["shape"]
    return int(shape["frames"] * shape["height"] * shape["width"])
