"""Rows as Markdown tables: the figures of a page, each shape by itself, and before them the largest in brief."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from corrdit.benchmark.comparisons import BASELINES, COMPARISONS
from corrdit.benchmark.floors import Ceilings
from corrdit.benchmark.runner import BOTH, FORWARD, Row
from corrdit.benchmark.shapes import Shape
from corrdit.files import markdown_table, written_beside

FILE = "table.md"
RELEASED = "materialized"


def milliseconds(value: float) -> str:
    """Three digits, in milliseconds or seconds."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def memory(value: float) -> str:
    """Two digits, in KiB, MiB or GiB."""
    mebi = value / 2**20
    if mebi >= 2**14:
        return f"{mebi / 2**10:.0f} GiB"
    if mebi < 0.1:
        return f"{value / 2**10:.0f} KiB"
    return f"{mebi:.0f} MiB" if mebi >= 10 else f"{mebi:.1f} MiB"


BELIEVABLE = 1.05


def percent(share: float) -> str:
    """A share of a limit; marked where it is so far above 1 that a busy machine must have measured the limit."""
    shown = f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
    return shown if share <= BELIEVABLE else f"{shown} (the limit was measured too low)"


def write_table(rows: Sequence[Row], folder: pathlib.Path) -> pathlib.Path:
    """`table.md`: what was measured on what, the largest shape in brief, and every shape in full."""
    path = folder / FILE
    names = list(dict.fromkeys(row["shape"]["name"] for row in rows))
    with written_beside(path, "w") as file:
        file.write("\n".join([*_head(rows), *_brief(rows), *(line for name in names for line in _full(rows, name))]))
        file.write("\n")
    return path


def shape_of(row: Row) -> Shape:
    return Shape(**row["shape"])


def largest_shape(rows: Sequence[Row]) -> Shape:
    """Of the shapes at which most operations and passes were timed, the one with most work."""
    timed = [row for row in rows if "milliseconds" in row] or rows
    lines: dict[Shape, set[tuple[str, str]]] = {}
    for row in timed:
        lines.setdefault(shape_of(row), set()).add((row["operation"], row["pass"]))
    return max(lines, key=lambda shape: (len(lines[shape]), shape.grid.tokens**2 * shape.channels))


def _head(rows: Sequence[Row]) -> list[str]:
    def every(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows))

    last = rows[-1]
    ceilings = Ceilings(last["matmul_tflops"], last["copy_gigabytes"], last["exponentials"])
    driver = f", driver {every('driver')}" if last["driver"] else ""
    return [
        f"Measured on {every('device')}{driver}, {every('threads')} threads, {every('dtype')}, torch {every('torch')}, "
        f"triton {every('triton')}, commit {every('commit')}. Limits of the device: {ceilings.label}.",
        "",
        "Median times; memory beyond inputs and outputs. Every result was compared with float64 before it was timed.",
        "",
    ]


def _brief(rows: Sequence[Row]) -> list[str]:
    shape = largest_shape(rows)
    columns = ["operation", "pass", "floor", "corrdit", "predicted", "replayed", "memory", "of the limit"]
    columns += ["fastest other way", "the released way"]
    lines = []
    for operation in COMPARISONS:
        for passes in (FORWARD, BOTH):
            here = _at(rows, shape.name, operation, passes)
            own = next((row for row in here if row["competitor"].startswith("corrdit ")), None)
            if own is None:
                continue
            others = [row for row in here if row["competitor"] in BASELINES]
            timed = [row for row in others if "milliseconds" in row]
            fastest = min(timed, key=lambda row: row["milliseconds"]["median"], default=None)
            released = next((row for row in others if row["competitor"] == RELEASED), None)
            floor = f"{milliseconds(own['floor_milliseconds'])}, {own['bound']}"
            others_cells = (_compared(fastest, own, name=True), _compared(released, own, name=False))
            own_cells = (_time(own), *_predicted_and_replayed(own), _memory(own), _share(own))
            lines.append((operation, passes, floor, *own_cells, *others_cells))
    return [f"## In brief: {shape.name} ({shape.label})", "", markdown_table(columns, lines)]


def _full(rows: Sequence[Row], shape_name: str) -> list[str]:
    shape = shape_of(next(row for row in rows if row["shape"]["name"] == shape_name))
    columns = ["operation", "way", *(word for passes in (FORWARD, BOTH) for word in (passes, "memory", "of the limit"))]
    lines = []
    for operation in COMPARISONS:
        here = [row for passes in (FORWARD, BOTH) for row in _at(rows, shape.name, operation, passes)]
        for number, competitor in enumerate(dict.fromkeys(row["competitor"] for row in here)):
            by_pass = {row["pass"]: row for row in here if row["competitor"] == competitor}
            about = next((row["about"] for row in by_pass.values() if "about" in row), None)
            cells = [operation if number == 0 else "", competitor + (f" ({about})" if about else "")]
            for passes in (FORWARD, BOTH):
                row = by_pass.get(passes)
                cells += ["", "", ""] if row is None else [_own_time(row), _memory(row), _share(row)]
            lines.append(cells)
    return [f"## {shape.name} ({shape.label})", "", markdown_table(columns, lines)]


def _at(rows: Sequence[Row], shape: str, operation: str, passes: str) -> list[Row]:
    return [
        row for row in rows if row["shape"]["name"] == shape and row["operation"] == operation and row["pass"] == passes
    ]


def _time(row: Row) -> str:
    return milliseconds(row["milliseconds"]["median"]) if "milliseconds" in row else str(row["status"])


def _predicted_and_replayed(row: Row) -> tuple[str, str]:
    """What was predicted of a call before any GPU had run it, and its time as a replayed CUDA graph."""
    predicted, replayed = row.get("predicted_milliseconds"), row.get("replay_milliseconds")
    failed = "failed" if "replay_left_out" in row else ""
    return (
        "" if predicted is None else milliseconds(predicted),
        failed if replayed is None else milliseconds(replayed),
    )


def _own_time(row: Row) -> str:
    """The time with what was predicted, and that of the replay, in brackets."""
    words = zip(("predicted", "replayed"), _predicted_and_replayed(row), strict=True)
    about = ", ".join(f"{word} {value}" for word, value in words if value)
    return _time(row) + (f" ({about})" if about else "")


def _memory(row: Row) -> str:
    return memory(row["extra_bytes"]) if "milliseconds" in row else ""


def _share(row: Row) -> str:
    return percent(row["share_of_limit"]) if "milliseconds" in row else ""


def _compared(row: Row | None, own: Row, *, name: bool) -> str:
    """Time, ratio to ours and memory of another way."""
    if row is None:
        return "none"
    prefix = f"{row['competitor']}: " if name else ""
    if "milliseconds" not in row:
        return prefix + str(row["status"])
    ratio = ""
    if "milliseconds" in own:
        ratio = f" ({row['milliseconds']['median'] / own['milliseconds']['median']:.2g} x)"
    return f"{prefix}{_time(row)}{ratio}, {_memory(row)}"
