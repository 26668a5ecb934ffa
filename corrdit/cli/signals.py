"""Ctrl-C, SIGTERM and SIGHUP end a command by an exception, and one long operation by force."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from corrdit.files import remove_own_unfinished

SECONDS_TO_UNWIND = 3.0
"""Python handles a signal between two of its own instructions; so long one operation of torch may keep it from that."""

_handled = threading.Event()
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(SystemExit):
    """By a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.code: int = 128 + number
        self.name = signal.Signals(number).name


def handle_signals() -> None:
    """Have signals leave by an exception, so that half-written files are removed on the way out.

    A process inside one operation for longer than `SECONDS_TO_UNWIND`, such as the attention over a whole video, is
    ended from a thread of its own that removes these files first. Nothing happens outside the main thread, and what is
    ignored (SIGHUP under `nohup`) stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # Forked workers that are ended by SIGTERM would write into the same pipe.
    os.register_at_fork(after_in_child=_forget_pipe)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


def _forget_pipe() -> None:
    signal.set_wakeup_fd(-1)


def _leave(number: int, frame: FrameType | None) -> None:
    _handled.set()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


def _watch(reading: int) -> None:
    while True:
        number = os.read(reading, 1)[0]
        # Lightning, for one, has handlers of its own while it runs, which let a step end.
        if number not in _SIGNALS or signal.getsignal(number) is not _leave:
            continue
        if not _handled.wait(SECONDS_TO_UNWIND):
            remove_own_unfinished()
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            print(f"corrdit: stopped by {name}; nothing unfinished was left behind", file=sys.stderr, flush=True)
            os._exit(128 + number)
        _handled.clear()
