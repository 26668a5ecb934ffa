"""Progress bars on the terminal's error stream; silent where that is not a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
