"""Checks of single arguments, each with a ValueError that names the argument, what was given and what is accepted."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import SupportsIndex

import numpy as np


def _index(value: object) -> int | None:
    try:
        return operator.index(value) if isinstance(value, SupportsIndex) else None
    except TypeError:  # tensors have an index only if they hold one whole number
        return None


def whole_number(name: str, value: object, minimum: int) -> int:
    """`value` as an int of at least `minimum`."""
    number = _index(value)
    if number is None or isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    return number


def finite_number(
    name: str, value: object, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """`value` as a finite float; if asked larger than `above`, at least `least`, at most `most`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    number = float(value)
    # Not math.isfinite, which a graph with numbers of any value cannot hold.
    fits = -math.inf < number < math.inf
    limits = ""
    if above is not None:
        fits, limits = fits and number > above, f" and above {above:g}"
    if least is not None:
        fits, limits = fits and number >= least, f"{limits} and at least {least:g}"
    if most is not None:
        fits, limits = fits and number <= most, f"{limits} and at most {most:g}"
    if not fits:
        raise ValueError(f"{name} must be finite{limits}, got {value}")
    return number


def flag(name: str, value: object) -> bool:
    """`value` as True or False, where `bool` would take any string for True."""
    if isinstance(value, str) or value not in (True, False):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def nearest(word: object, accepted: Iterable[str]) -> str:
    """The end of a message: "; did you mean ...?", empty where no accepted word is near."""
    near = difflib.get_close_matches(str(word).lower(), by_lower := {entry.lower(): entry for entry in accepted}, n=1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def choice(name: str, value: str, accepted: Iterable[str]) -> str:
    """`value` if it is one of the accepted words."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}{nearest(value, accepted)}")
    return value


DTYPES = ("float32", "bfloat16", "float16")
"""Precisions of a model."""
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


def dtype_name(name: str, value: object, accepted: Iterable[str] = DTYPES) -> str:
    """The name of a precision, such as "bfloat16", from it, a short form such as "bf16", or torch's type."""
    given = str(value).strip().lower().removeprefix("torch.")
    return choice(name, _SHORT_DTYPES.get(given, given), accepted)


def real_array(name: str, array: np.ndarray) -> np.ndarray:
    """Real, finite numbers as float64."""
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be real numbers, got {array.dtype}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} numbers that are NaN or infinite")
    return array


def entries(name: str, values: object) -> list[object]:
    """The entries of a list or of anything else that can be walked through, a text or a dictionary apart."""
    try:
        if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
            return list(values)
    except TypeError:  # a tensor without axes has `__iter__`, but cannot be iterated
        pass
    raise ValueError(f"{name} must be a list, got {values!r}")


def whole_indices(name: str, value: object) -> list[int]:
    """One whole number or several (lists, ranges, generators, arrays, tensors) as a list of ints.

    Raises:
        ValueError: anything else, True and False among it, or none at all.
    """
    # An array or tensor without axes has `__iter__`, but cannot be iterated.
    given: list[object] = list(value) if isinstance(value, Iterable) and getattr(value, "ndim", None) != 0 else [value]
    if not given:
        raise ValueError(f"{name} is empty; give at least one")
    indices = [index for index in map(_index, given) if index is not None]
    if len(indices) < len(given):
        raise ValueError(f"{name} must be whole numbers, got {value!r}")
    if any(isinstance(entry, bool) or str(getattr(entry, "dtype", "")).endswith("bool") for entry in given):
        raise ValueError(f"{name} must be whole numbers, got {value!r}; True and False are no numbers here")
    return indices


def resolved_index(name: str, value: object, count: int, among: str) -> int:
    """`value` as a non-negative index below `count`, negative ones counted from the last.

    Raises:
        ValueError: not one whole number, or outside; `among` says in the message what there are so many of.
    """
    (index,) = whole_indices(name, [value])
    if not -count <= index < count:
        raise ValueError(f"{name} {value} is outside {among} (0 to {count - 1}, or -{count} to -1 from the last)")
    return index % count
