"""Tile sizes of every kernel, for compute capabilities 8.0, 8.9, 9.0 and 10.0.

The tables are read when a kernel is launched and are keyed by kernel, element size and padded head_dim, never by the
number of tokens. Other devices take the table of the nearest one that has no more shared memory than they: 8.6 and 12.x
(100 KiB) that of 8.9, every later data-centre part that of 10.0. AMD devices are refused where kernels are launched
(`corrdit.kernels.requirements`): no table of theirs has been tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

INTERPRETER = "interpreter"
ARCHITECTURES = ("8.0", "8.9", "9.0", "10.0")
SHARED_BYTES = {"8.0": 163 * 1024, "8.9": 99 * 1024, "9.0": 227 * 1024, "10.0": 227 * 1024}


class Tiles(NamedTuple):
    """How one kernel is cut: query rows, key columns, columns of head_dim at a time, warps, pipeline stages."""

    rows: int
    columns: int
    dims: int
    warps: int
    stages: int


# With a window: blocks of 8 x 8 tokens, the fewest rows that wgmma takes, and key tiles of up to 8 x 8.
_WINDOWED = {
    "soft_forward_window": {64: Tiles(64, 64, 64, 4, 2), 128: Tiles(64, 64, 128, 4, 2), 256: Tiles(64, 32, 256, 4, 1)},
    "soft_backward_query_window": {
        64: Tiles(64, 64, 64, 4, 2),
        128: Tiles(64, 32, 128, 4, 2),
        256: Tiles(64, 16, 256, 4, 1),
    },
    "soft_backward_key_window": {
        64: Tiles(64, 64, 64, 4, 2),
        128: Tiles(32, 64, 128, 4, 2),
        256: Tiles(32, 32, 256, 4, 1),
    },
    "folded_forward_window": {256: Tiles(64, 64, 64, 4, 3)},
    "best_match_window": {256: Tiles(64, 64, 64, 4, 2)},
    "best_product_window": {64: Tiles(64, 64, 64, 4, 2), 128: Tiles(64, 64, 128, 4, 2), 256: Tiles(64, 32, 256, 4, 1)},
    "best_product_folded_window": {256: Tiles(64, 64, 64, 4, 2)},
}
# kernel -> padded head_dim up to which a row holds -> tiles. 16-bit operands, shared memory of 9.0 and 10.0. Four warps
# cover 64 rows of a product (columns, in the kernels of dk): more warps than rows would compute every score twice.
_LARGE = {
    "soft_forward": {64: Tiles(128, 128, 64, 8, 3), 128: Tiles(128, 128, 128, 8, 3), 256: Tiles(128, 64, 256, 8, 2)},
    "soft_backward_query": {
        64: Tiles(128, 128, 64, 8, 3),
        128: Tiles(128, 64, 128, 8, 2),
        256: Tiles(128, 32, 256, 8, 2),
    },
    # Fewer queries than dq has, or triton 3.6 spills.
    "soft_backward_key": {
        64: Tiles(64, 128, 64, 8, 3),
        128: Tiles(32, 128, 128, 8, 2),
        256: Tiles(16, 128, 256, 8, 2),
    },
    "folded_forward": {256: Tiles(128, 256, 64, 8, 3)},
    "folded_gradient": {16: Tiles(128, 64, 16, 8, 4), 256: Tiles(128, 128, 32, 8, 4)},
    "row_statistics": {64: Tiles(64, 128, 64, 4, 3), 128: Tiles(64, 128, 128, 4, 2), 256: Tiles(64, 64, 256, 4, 2)},
    "row_statistics_folded": {256: Tiles(64, 128, 64, 4, 3)},
    "cost_rows": {64: Tiles(64, 128, 64, 8, 2), 256: Tiles(64, 64, 128, 8, 2)},
    "attention_mass": {64: Tiles(64, 128, 64, 4, 2), 256: Tiles(64, 64, 128, 4, 2)},
    "best_match": {64: Tiles(64, 128, 64, 8, 2), 256: Tiles(64, 64, 128, 8, 2)},
    "best_match_folded": {256: Tiles(128, 128, 64, 8, 3)},
    "best_product": {64: Tiles(64, 64, 64, 4, 3), 128: Tiles(64, 64, 128, 4, 3), 256: Tiles(64, 64, 256, 4, 2)},
    "best_product_folded": {256: Tiles(128, 128, 64, 8, 3)},
    "refinement": {128: Tiles(32, 16, 64, 4, 1), 256: Tiles(16, 16, 64, 4, 1)},
    "local_forward": {64: Tiles(128, 64, 64, 4, 3), 128: Tiles(128, 64, 128, 8, 2), 256: Tiles(128, 32, 256, 8, 2)},
    "local_backward_query": {
        64: Tiles(128, 64, 64, 8, 2),
        128: Tiles(128, 64, 128, 8, 2),
        256: Tiles(128, 16, 256, 8, 2),
    },
    "local_backward_key": {64: Tiles(64, 128, 64, 8, 2), 128: Tiles(32, 128, 128, 8, 2), 256: Tiles(32, 32, 256, 8, 1)},
    **_WINDOWED,
}
# The same for the shared memory of 8.0 (163 KiB) and of 8.9 (99 KiB), where products run on mma.sync.
_MEDIUM = {
    "soft_forward": {64: Tiles(128, 64, 64, 4, 3), 128: Tiles(128, 64, 128, 8, 2), 256: Tiles(64, 32, 256, 4, 2)},
    "soft_backward_query": {64: Tiles(64, 32, 64, 4, 3), 128: Tiles(64, 32, 128, 4, 2), 256: Tiles(64, 16, 256, 4, 1)},
    "soft_backward_key": {64: Tiles(32, 64, 64, 4, 3), 128: Tiles(32, 64, 128, 4, 2), 256: Tiles(16, 64, 256, 4, 1)},
    "folded_forward": {256: Tiles(128, 128, 32, 8, 3)},
    "folded_gradient": {256: Tiles(128, 128, 32, 8, 3)},
    "row_statistics": {64: Tiles(64, 64, 64, 4, 2), 128: Tiles(64, 64, 128, 4, 2), 256: Tiles(64, 32, 256, 4, 2)},
    "row_statistics_folded": {256: Tiles(64, 64, 64, 4, 2)},
    "cost_rows": {64: Tiles(64, 32, 64, 4, 2), 256: Tiles(64, 64, 64, 4, 2)},
    "attention_mass": {256: Tiles(64, 64, 64, 4, 2)},
    "best_match": {64: Tiles(64, 32, 64, 4, 2), 256: Tiles(64, 64, 64, 4, 2)},
    "best_match_folded": {256: Tiles(64, 64, 64, 4, 2)},
    "best_product": {64: Tiles(64, 64, 64, 4, 2), 128: Tiles(64, 64, 128, 4, 2), 256: Tiles(64, 32, 256, 4, 2)},
    "best_product_folded": {256: Tiles(64, 64, 64, 4, 2)},
    "refinement": {256: Tiles(32, 16, 64, 4, 1)},
    "local_forward": {64: Tiles(128, 64, 64, 8, 2), 128: Tiles(64, 32, 128, 4, 2), 256: Tiles(64, 16, 256, 4, 1)},
    "local_backward_query": {64: Tiles(64, 64, 64, 4, 2), 128: Tiles(64, 32, 128, 4, 2), 256: Tiles(64, 16, 256, 4, 1)},
    "local_backward_key": {64: Tiles(32, 64, 64, 4, 2), 128: Tiles(32, 32, 128, 4, 1), 256: Tiles(16, 64, 256, 8, 1)},
    **_WINDOWED,
    "soft_backward_query_window": {**_WINDOWED["soft_backward_query_window"], 64: Tiles(64, 32, 64, 4, 2)},
}
# 10.0 keeps sums of products outside of the registers, and copies a tile of them in: less fits beside it.
_BLACKWELL = {
    **_LARGE,
    "attention_mass": {64: Tiles(64, 128, 64, 8, 2), 256: Tiles(64, 64, 128, 4, 2)},
    "best_match_folded": {256: Tiles(64, 128, 64, 8, 3)},
    "best_product_folded": {256: Tiles(128, 64, 64, 8, 3)},
}
# Where a mask or a window takes registers too; the other kernels fit them beside their own tiles.
_GUARDED = {
    "soft_backward_query": {
        64: Tiles(128, 64, 64, 8, 3),
        128: Tiles(128, 64, 128, 8, 2),
        256: Tiles(128, 16, 256, 8, 2),
    },
    "soft_backward_key": {64: Tiles(64, 128, 64, 8, 2), 128: Tiles(32, 128, 128, 8, 2), 256: Tiles(16, 128, 256, 8, 2)},
    "folded_gradient": {16: Tiles(128, 64, 16, 8, 4), 256: Tiles(128, 64, 32, 8, 4)},
    "best_match": {16: Tiles(64, 32, 16, 4, 2), 64: Tiles(64, 64, 64, 4, 2), 256: Tiles(64, 64, 128, 8, 2)},
    "best_match_folded": {64: Tiles(128, 128, 32, 8, 3), 256: Tiles(128, 128, 64, 8, 2)},
}
_GUARDED_TABLES = {"9.0": _GUARDED, "10.0": {**_GUARDED, "best_match_folded": _BLACKWELL["best_match_folded"]}}
# float32: twice the bytes, and products on the floating-point units unless tf32 is asked for.
_FLOAT32 = {
    kernel: {64: Tiles(32, 32, 32, 4, 1), 128: Tiles(32, 32, 32, 4, 1), 256: Tiles(16, 16, 32, 4, 1)}
    for kernel in _LARGE
}
_TABLES = {"8.0": _MEDIUM, "8.9": _MEDIUM, "9.0": _LARGE, "10.0": _BLACKWELL}
# Small enough that a frame of a few dozen tokens is still cut into several tiles with a ragged last one.
_INTERPRETED = Tiles(32, 16, 16, 1, 1)

_overrides: dict[str, Tiles] = {}


def table_of(capability: tuple[int, int]) -> str:
    """The architecture whose table a device of this compute capability takes.

    Raises:
        RuntimeError: a capability below 8.0, which lacks bfloat16 and asynchronous copies.
    """
    if capability < (8, 0):
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 or later, this one has {capability[0]}.{capability[1]}; "
            'use backend="streaming"'
        )
    if capability == (8, 0):
        return "8.0"
    if capability[0] == 9:
        return "9.0"
    return "10.0" if capability[0] in (10, 11) else "8.9"


def tiles(kernel: str, architecture: str, head_dim: int, element_bytes: int, guarded: bool = False) -> Tiles:
    """The tiles of one launch, with `dims` no larger than the padded head_dim where the kernel cuts head_dim.

    Args:
        guarded: whether scores are masked in every tile.
    """
    if kernel in _overrides:
        chosen = _overrides[kernel]
    elif architecture == INTERPRETER:
        chosen = _INTERPRETED
    else:
        table = _FLOAT32 if element_bytes == 4 else _TABLES[architecture]
        own = _GUARDED_TABLES.get(architecture, {}) if guarded and element_bytes < 4 else {}
        rows = own.get(kernel, table[kernel])
        chosen = rows[min(limit for limit in rows if limit >= padded_head_dim(head_dim))]
    return chosen._replace(dims=min(chosen.dims, padded_head_dim(head_dim)))


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that holds head_dim: what a matrix product on tensor cores takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@contextlib.contextmanager
def override(**kernels: Tiles) -> Iterator[None]:
    """Runs the named kernels with the given tiles: for tuning, and to pin tiles in a test.

    Raises:
        ValueError: a kernel that does not exist, or tiles the hardware cannot take.
    """
    for name, chosen in kernels.items():
        if name not in _LARGE:
            raise ValueError(f"no kernel is called {name!r}; there are {', '.join(_LARGE)}")
        if any(size < 16 or size & (size - 1) for size in chosen[:3]):
            raise ValueError(f"rows, columns and dims of {name} must be powers of two of at least 16, got {chosen}")
    before = dict(_overrides)
    _overrides.update(kernels)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
