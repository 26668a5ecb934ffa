"""Pickles are read as data: arrays and containers come back, everything else is refused and not run."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools

import numpy as np
import pytest

from corrdit.data.restricted_pickle import load_arrays

ARRAYS = {
    "float32": np.random.default_rng(0).random((3, 4, 2)).astype(np.float32),
    "float64": np.random.default_rng(1).random((2, 5)),
    "big endian": np.arange(6, dtype=">i4").reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "strided": np.arange(20)[::3],
    "bool": np.array([[True, False], [False, True]]),
    "frames": np.random.default_rng(2).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8),
    "bytes": np.array([b"\xff\xd8abc", b"\xff\xd8d"]),
    "objects": np.array([b"\xff\xd8abc\x00\x00", b"x", None], dtype=object),
    "empty": np.zeros((0, 4)),
    "number": np.float32(2.5),
    "whole": np.int64(-7),
}


def write(path, value, protocol=4):
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", list(ARRAYS))
def test_arrays_come_back(tmp_path, protocol, name):
    array = ARRAYS[name]
    again = load_arrays(write(tmp_path / "a.pkl", {"value": array, "list": [1, 2.5, None, "text", (array,)]}, protocol))
    for value in (again["value"], again["list"][4][0]):
        assert value.dtype == array.dtype
        assert value.shape == array.shape
        assert value.tolist() == array.tolist()
    assert again["list"][:4] == [1, 2.5, None, "text"]


def test_names_of_older_numpy_are_understood(tmp_path):
    written = pickle.dumps(ARRAYS["float64"], 2)
    older = written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert older != written
    np.testing.assert_array_equal(load_arrays(write(tmp_path / "a.pkl", older)), ARRAYS["float64"])


class Command:
    def __init__(self, call, *arguments):
        self.recipe = (call, arguments)

    def __reduce__(self):
        return self.recipe


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "make, named",
    [
        (lambda mark: Command(os.mkdir, mark), "mkdir"),
        (lambda mark: Command(os.system, f"touch {mark}"), "system"),
        (lambda mark: Command(eval, f"open({mark!r}, 'w')"), "eval"),
        (lambda mark: Command(getattr, "text", "upper"), "getattr"),
        (lambda mark: Command(np.load, mark), "numpy"),
        (lambda mark: Command(np.fromfile, mark), "numpy"),
        (lambda mark: collections.OrderedDict(a=1), "OrderedDict"),
        (lambda mark: [np.zeros(2), Command(open, mark, "w")], "open"),
    ],
)
def test_a_malicious_file_is_refused_and_not_run(tmp_path, make, named, protocol):
    mark = tmp_path / "was_run"
    path = write(tmp_path / "bad.pkl", {"video": make(str(mark))}, protocol)
    with pytest.raises(ValueError, match="only numpy arrays and plain containers are read") as caught:
        load_arrays(path)
    assert named in str(caught.value)
    assert "bad.pkl" in str(caught.value)
    assert not mark.exists()


def array_with(state) -> bytes:
    """A pickle that builds an array from a made-up state."""
    body = pickle.dumps(np.zeros(1), 2)
    operations = list(pickletools.genops(body))
    position = next(place for operation, _, place in operations if operation.name == "REDUCE") + 1
    return body[:position] + pickle.dumps(state, 2)[2:-1] + b"b."


@pytest.mark.parametrize(
    "state",
    [
        (1, (2**40,), None, False, b""),
        (1, (2,), "f8", False, b"12345678"),
        (1, (3,), 7, False, b""),
        (1, (-1,), None, False, None),
        "text",
    ],
)
def test_made_up_arrays_are_refused(tmp_path, state):
    with pytest.raises(ValueError, match="not a whole pickle"):
        load_arrays(write(tmp_path / "bad.pkl", array_with(state)))


@pytest.mark.parametrize(
    "dtype", [np.dtype([("a", "f4"), ("b", "i4")]), np.dtype("M8[s]"), np.dtype("c16"), np.dtype("V4")]
)
def test_other_types_of_array_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match="not a whole pickle"):
        load_arrays(write(tmp_path / "a.pkl", np.zeros(3, dtype)))


def test_the_stand_ins_cannot_be_changed_by_a_pickle(tmp_path):
    # BUILD with a slot state tries to set attributes on whatever the name stands for.
    for name in (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n"):
        program = b"\x80\x02" + name + b"N}X\x08\x00\x00\x00__init__K\x01s\x86b."
        with pytest.raises(ValueError, match="not a whole pickle"):
            load_arrays(write(tmp_path / "bad.pkl", program))
    np.testing.assert_array_equal(load_arrays(write(tmp_path / "a.pkl", np.arange(3))), np.arange(3))


def test_damaged_files_are_named(tmp_path):
    whole = pickle.dumps({"a": np.arange(1000)})
    for content in (b"", b"text", whole[:-1], whole[: len(whole) // 2], whole[10:]):
        with pytest.raises(ValueError, match=r"bad\.pkl"):
            load_arrays(write(tmp_path / "bad.pkl", content))
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "absent.pkl")


def test_a_list_that_holds_itself_is_refused(tmp_path):
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="not a whole pickle"):
        load_arrays(write(tmp_path / "bad.pkl", endless))


def test_shared_arrays_stay_shared(tmp_path):
    array = np.arange(4)
    again = load_arrays(write(tmp_path / "a.pkl", [array, array]))
    assert again[0] is again[1]
