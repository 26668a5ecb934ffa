"""Tables on standard output, and progress bars on the error stream; these are silent where it is not a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol


class Report(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """So much is done of so much; a note beside the bar stays until the next one."""


@contextlib.contextmanager
def progress_bar(description: str) -> Iterator[Report]:
    """Gives a function `report(done, total, note=None)` that moves the bar; the bar vanishes when the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.fields[note]}")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None, note="")

        def report(done: int, total: int, note: str | None = None) -> None:
            progress.update(task, completed=done, total=total)
            if note is not None:
                progress.update(task, note=note)

        yield report


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; where the output is no terminal, wide enough that nothing is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    with console.capture() as capture:  # Console.print would end the process when the reader of a pipe has gone
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
