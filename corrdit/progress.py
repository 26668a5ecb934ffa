"""The bar of long work that was given no `progress` of its own: tqdm's, in notebooks and on terminals."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all)."""

_SECONDS_WITHOUT = 1.0
"""Work that is done by then shows no bar."""
_hidden = ContextVar("hidden", default=False)


@contextlib.contextmanager
def hidden_bars() -> Iterator[None]:
    """No bars inside, for what shows its own progress."""
    before = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(before)


def progress_or_bar(progress: Progress | None, description: str) -> Progress:
    """The function that was given, or a bar that closes when all is done.

    The bar is tqdm's for notebooks or terminals; where there is neither, as in a log, and with TQDM_DISABLE=1 there is
    none.
    """
    if progress is not None:
        return progress
    if _hidden.get() or not ("ipykernel" in sys.modules or sys.stderr.isatty()):
        return lambda done, total: None
    from tqdm.auto import tqdm

    bar = tqdm(desc=description, delay=_SECONDS_WITHOUT, leave=False)

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return move
