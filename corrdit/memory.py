"""Telling that there is not enough memory from other errors, and saying it in a line."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or on a GPU.

    torch says so by a bare RuntimeError on the CPU, numpy by a MemoryError.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
