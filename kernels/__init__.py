"""Triton kernels of the operations, forward and backward; one function for each, as in `corrdit.reference`.

Importing this package imports neither triton nor torch; a function's kernels are loaded when it is first asked for. The
kernels run on NVIDIA devices of compute capability 8.0 and later. AMD devices are refused with a RuntimeError: no tiles
of theirs have been tried. With TRITON_INTERPRET=1 set before triton is imported they run on CPU tensors, slowly.
"""

from __future__ import annotations

import importlib
from typing import Any

# No module is called like its function: importing it would put the module in the function's place.
_HOMES = {
    "attention_mass": "mass",
    "cost_rows": "costs",
    "frame_local_attention": "frame_local",
    "hard_displacement": "hard",
    "match": "matching",
    "soft_displacement": "soft",
    "float32_precision": "launch",
}

__all__ = [
    "attention_mass",
    "cost_rows",
    "float32_precision",
    "frame_local_attention",
    "hard_displacement",
    "match",
    "soft_displacement",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
