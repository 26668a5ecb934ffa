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


def leaves_device_unusable(error: BaseException) -> bool:
    """Whether a GPU is of no more use to this process after an error, such as an access outside of its memory.

    What cannot be captured in a graph is refused and does no harm.
    """
    text = str(error)
    told = "CUDA error" in text or "Triton Error [CUDA]" in text
    return told and not is_out_of_memory(error) and "captur" not in text


def first_line(error: BaseException) -> str:
    """The beginning of what an error says, for a message of one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
