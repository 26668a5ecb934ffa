"""Reading pickles that hold numpy arrays and plain containers, without running anything they ask for.

A pickle is a program: loading one calls whatever importable function it names. Data sets are nevertheless published as
pickles. Here every name a pickle may use is one of a short table, and what stands behind the name is not numpy's own
constructor but a class of this file that keeps the raw description of an array. The arrays are built afterwards, from
checked descriptions.
"""

from __future__ import annotations

import math
import os
import pickle
from typing import Any

import numpy as np

ALLOWED_KINDS = "biufSO"
_RECONSTRUCTION_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


def load_arrays(path: str | os.PathLike[str]) -> object:
    """The contents of a pickle of dicts, lists, tuples, sets, strings, bytes, numbers and numpy arrays.

    Args:
        path: the file.

    Returns:
        The object with its arrays as `numpy.ndarray`, read-only because they share the file's bytes; arrays of objects
        hold plain containers, bytes and arrays.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a pickle, a truncated one, or one that names anything else, which is not run.
    """
    with open(path, "rb") as file:
        try:
            return _built(_RestrictedUnpickler(file).load())
        except MemoryError:
            raise ValueError(f"{os.fspath(path)} is broken: it asks for more memory than there is") from None
        except ForbiddenNameError as error:
            raise ValueError(f"{os.fspath(path)} {error}") from None
        except Exception as error:
            # A damaged program of the unpickler can fail in any way the stand-ins or its stack machine can.
            kind = type(error).__name__
            raise ValueError(
                f"{os.fspath(path)} is not a whole pickle of arrays and plain containers ({kind}: {error})"
            ) from error


class ForbiddenNameError(ValueError):
    """A pickle names something beyond arrays and plain containers."""


class _ClassMark:
    """Stands for `numpy.ndarray`, which pickles name only as an argument; it can neither be called nor changed."""

    __slots__ = ()


class _StandIn:
    """Base of the callables a pickle may use: no attributes beyond the slots, and a state only where one belongs."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"{type(self).__name__.strip('_')} with an unexpected state")


class _Dtype(_StandIn):
    """`numpy.dtype(code, align, copy)` and its state (version, byte order, ...)."""

    __slots__ = ("value",)

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.value = np.dtype(str(code))
        if self.value.kind not in ALLOWED_KINDS or self.value.fields or self.value.subdtype:
            raise ValueError(f"arrays of type {code!r} are not read, only numbers, bytes and objects")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if any(part is not None for part in state[2:5]):
            raise ValueError("structured arrays are not read")
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array(_StandIn):
    """`_reconstruct(ndarray, (0,), b"b")`, then the state (version, shape, dtype, Fortran order, data)."""

    __slots__ = ("data", "dtype", "order", "shape")
    shape: tuple[int, ...]

    def __init__(self, subtype: object, shape: tuple[int, ...], code: bytes) -> None:
        self.shape, self.dtype, self.order, self.data = (0,), np.dtype("u1"), "C", b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, data = state[-4:]
        self.shape = tuple(int(size) for size in shape)
        self.dtype, self.order, self.data = dtype.value, "F" if fortran else "C", data

    def build(self, seen: dict[int, object]) -> np.ndarray:
        if self.dtype.kind != "O":
            return np.frombuffer(self.data, self.dtype).reshape(self.shape, order=self.order)  # type: ignore
        if not isinstance(self.data, list) or len(self.data) != math.prod(self.shape):
            raise ValueError("an array of objects whose contents are not a list of its length")
        array = np.empty(len(self.data), dtype=object)
        for index, item in enumerate(self.data):
            array[index] = _built(item, seen)
        return array.reshape(self.shape, order=self.order)  # type: ignore[call-overload]


class _BufferArray(_Array):
    """`_frombuffer(buffer, dtype, shape, order)` of pickle protocol 5."""

    __slots__ = ()

    def __init__(self, buffer: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: object = None) -> None:
        if dtype.value.kind == "O" or axes is not None or order not in ("C", "F"):
            raise ValueError("an array in a layout that is not read")
        self.data, self.dtype, self.shape, self.order = buffer, dtype.value, tuple(int(size) for size in shape), order


class _Scalar(_StandIn):
    """`scalar(dtype, bytes)`: a numpy number."""

    __slots__ = ("data", "dtype")

    def __init__(self, dtype: _Dtype, data: bytes) -> None:
        if dtype.value.kind == "O":
            raise ValueError("a scalar of type object")
        self.dtype, self.data = dtype.value, data

    def build(self) -> object:
        return np.frombuffer(self.data, self.dtype)[0]


class _LatinBytes(_StandIn):
    """`_codecs.encode(text, "latin1")`: how old pickle protocols write bytes."""

    __slots__ = ()

    def __new__(cls, text: str, encoding: str) -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError(f"text in the encoding {encoding!r}")
        return text.encode("latin1")


class _NoBytes(_StandIn):
    """`bytes()`: how old pickle protocols write no bytes."""

    __slots__ = ()

    def __new__(cls) -> Any:
        return b""


_ALLOWED_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _ClassMark(),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _LatinBytes,
    ("__builtin__", "bytes"): _NoBytes,
    ("builtins", "bytes"): _NoBytes,
    **{(module, "_reconstruct"): _Array for module in _RECONSTRUCTION_MODULES},
    **{(module, "scalar"): _Scalar for module in _RECONSTRUCTION_MODULES},
    **{(module, "_frombuffer"): _BufferArray for module in _BUFFER_MODULES},
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _ALLOWED_NAMES[module, name]
        except KeyError:
            raise ForbiddenNameError(
                f"asks for {module}.{name}; only numpy arrays and plain containers are read from pickles, and nothing "
                "in it was run"
            ) from None


def _built(value: object, seen: dict[int, object] | None = None) -> object:
    """The same containers with arrays and numbers in place of their descriptions; shared parts stay shared."""
    seen = {} if seen is None else seen
    if isinstance(value, _Scalar):
        return value.build()
    if not isinstance(value, (_Array, dict, list, tuple)):
        if isinstance(value, (_StandIn, _ClassMark, type)):
            raise ValueError("a description of an array in place of an array")
        return value
    if id(value) not in seen:
        if isinstance(value, _Array):
            seen[id(value)] = value.build(seen)
        elif isinstance(value, dict):
            seen[id(value)] = {_built(key, seen): _built(item, seen) for key, item in value.items()}
        elif isinstance(value, list):
            seen[id(value)] = [_built(item, seen) for item in value]
        else:
            seen[id(value)] = tuple(_built(item, seen) for item in value)
    return seen[id(value)]
