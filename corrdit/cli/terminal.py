"""Tables on standard output, and progress bars on the error stream; a few lines where that is not a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0
_NUMBERS = re.compile(r"[-\d., \[\]]+")


class Report(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int | None, note: str | None = None, phase: str | None = None) -> None:
        """So much is done of so much; a note beside the bar stays until the next one; a phase is what begins now."""


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Report]:
    """Gives a function `report(done, total, note=None, phase=None)` that moves the bar, which vanishes at the end.

    Where the error stream is no terminal there are lines in its place: one as each named phase begins, and one every
    ten seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.fields[note]}")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
    lines = _Lines(description)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, note="")

        def report(done: int, total: int | None, note: str | None = None, phase: str | None = None) -> None:
            nonlocal task
            if not console.is_terminal:
                lines.report(done, total, note, phase)
                return
            if phase is not None:
                progress.refresh()  # the last phase's last state is seen
                progress.remove_task(task)
                task = progress.add_task(phase, total=None, note="")
            progress.update(task, completed=done, total=total)
            if note is not None:
                progress.update(task, note=note)

        yield report


class _Lines:
    def __init__(self, description: str) -> None:
        self._phase, self._printed = description, time.monotonic()

    def report(self, done: int, total: int | None, note: str | None, phase: str | None) -> None:
        self._phase = phase or self._phase
        if phase is None and time.monotonic() - self._printed < SECONDS_BETWEEN_LINES:
            return
        counted = f" {done}/{total}" if total and phase is None else ""
        print(f"{self._phase}{counted}{f', {note}' if note else ''}", file=sys.stderr, flush=True)
        self._printed = time.monotonic()


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, numbers: bool = False
) -> None:
    """Print a table; where the output is no terminal, wide enough that nothing is cut. Plain where rich is missing.

    With `numbers` columns of numbers, intervals and dashes are set to the right.
    """
    if find_spec("rich") is None:
        lines = [tuple(columns), *rows]
        widths = [max(map(len, cells)) + 2 for cells in zip(*lines, strict=True)]
        for line in lines:
            print("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    if numbers:
        for column, cells in zip(table.columns, zip(*rows, strict=True), strict=False):
            column.justify = "right" if all(_NUMBERS.fullmatch(cell) for cell in cells) else "left"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    # Where the reader of a pipe has gone, a Console ends the process: it prints nothing, and finds nothing to flush.
    sys.stdout.flush()
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
