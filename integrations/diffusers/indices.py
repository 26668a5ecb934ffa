"""Whole numbers that people give as layers and steps."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def whole_indices(name: str, value: Any) -> list[int]:
    """One whole number or several (lists, ranges, generators, arrays, tensors) as a list of ints.

    Raises:
        ValueError: anything else, True and False among it, or none at all.
    """
    # An array or tensor without axes has `__iter__`, but cannot be iterated.
    single = not isinstance(value, Iterable) or getattr(value, "ndim", None) == 0
    entries = [value] if single else list(value)
    if not entries:
        raise ValueError(f"{name} is empty; give at least one")
    try:
        indices = [operator.index(entry) for entry in entries]
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, got {value!r}") from None
    if any(_is_truth_value(entry) for entry in entries):
        raise ValueError(f"{name} must be whole numbers, got {value!r}; True and False are no numbers here")
    return indices


def resolved_index(name: str, value: Any, count: int) -> int | None:
    """`value` as a non-negative index below `count`, negative ones counted from the last; None if it is outside.

    Raises:
        ValueError: not one whole number.
    """
    (index,) = whole_indices(name, [value])
    return index % count if -count <= index < count else None


def _is_truth_value(entry: Any) -> bool:
    return isinstance(entry, bool) or str(getattr(entry, "dtype", "")).endswith("bool")
