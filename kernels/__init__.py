"""Triton kernels of the operations, forward and backward; one function for each, as in `corrdit.reference`.

Importing this package imports neither triton nor torch; `operations` is loaded when a function is first asked for. The
kernels run on NVIDIA devices of compute capability 8.0 and later. AMD devices are refused with a RuntimeError: no tiles
of theirs have been tried. With TRITON_INTERPRET=1 set before triton is imported they run on CPU tensors, slowly.
"""

from __future__ import annotations

__all__ = [
    "attention_mass",
    "cost_rows",
    "float32_precision",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from corrdit.kernels import operations

    value: object = getattr(operations, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
