"""Every kernel with the inputs that select it, for compiling all of them ahead of time."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.kernels.displacement.soft import compute_soft_displacement, compute_soft_displacement_backward
from corrdit.kernels.frame_local.attention import compute_frame_local_attention, compute_frame_local_attention_backward
from corrdit.kernels.frame_local.forward import LocalLayout
from corrdit.kernels.inspection.ahead_of_time import ARCHITECTURES, Compiled, meta_heads, recording
from corrdit.kernels.inspection.floors import soft_floor
from corrdit.kernels.matching.costs import compute_cost_rows
from corrdit.kernels.matching.hard import compute_hard_displacement
from corrdit.kernels.matching.mass import compute_attention_mass
from corrdit.kernels.matching.match import compute_match
from corrdit.problem import float32_precision, product_precision

# CogVideoX-5B's heads and frame; two frames stand for all, no kernel depends on their number.
HEADS = 48
GRID = TokenGrid(frames=2, height=30, width=45, text_tokens=226)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (16, 64, 96, 128, 256)
_PAIRS = [0, 1, 1, 0]


class Entry(NamedTuple):
    """One call of an operation; `heads` is its head mode, or its variant where it has none."""

    operation: str
    heads: str


_HEADS = {
    "soft_displacement": ("none", "logits"),
    "hard_displacement": ("none", "logits", "probabilities"),
    "match": ("logits", "probabilities"),
    "cost_rows": ("probabilities",),
    "attention_mass": ("probabilities",),
    "frame_local_attention": ("renormalized", "zeroed"),
}
ENTRIES = tuple(Entry(operation, heads) for operation, modes in _HEADS.items() for heads in modes)


class Row(NamedTuple):
    """One compiled kernel of one entry, as `corrdit kernels` prints it."""

    op: str
    pass_name: str
    heads: str
    dtype: str
    head_dim: int
    arch: int
    compiled: Compiled

    def report(self) -> dict[str, object]:
        """The row as one JSON object."""
        compiled = self.compiled
        folded = self.heads == "logits"
        depth = HEADS * self.head_dim if folded else self.head_dim
        turns = (HEADS if folded else 1) * -(-self.head_dim // compiled.tiles.dims)
        instructions = compiled.instructions_per_element(turns)
        report: dict[str, object] = {
            "op": self.op,
            "pass": self.pass_name,
            "heads": self.heads,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "arch": self.arch,
            "kernel": compiled.kernel,
            "tiles": list(compiled.tiles),
            **{name: getattr(compiled, name) for name in ("registers", "spill_bytes", "shared_bytes")},
            **{name: getattr(compiled, name) for name in ("launchable", "tensor_cores")},
            "serialized_products": compiled.serialized,
            "repetition": compiled.repetition,
            "instructions_per_element": None if instructions is None else round(instructions, 3),
        }
        if self.dtype != "float32":
            report.update(self._cycles(turns))
        if compiled.kernel == "folded_forward" and self.dtype != "float32":
            share = compiled.epilogue_share(depth)
            report["epilogue_share_of_tensor_cycles"] = None if share is None else round(share, 4)
        return report

    def _cycles(self, turns: int) -> dict[str, object]:
        """Cycles of each unit for a score, and for soft displacement of single heads the floor."""
        units = self.compiled.cycles_per_element(turns)
        cycles: dict[str, object] = {
            "cycles_per_element": units and {n: c if c is None else round(c, 4) for n, c in units.items()}
        }
        floor = soft_floor(self.compiled.kernel, self.head_dim, ARCHITECTURES[self.arch], self.compiled.tiles)
        if floor is None:
            return cycles
        unavoidable = round(floor.instructions, 3) if self.arch == 90 else None
        return {
            **cycles, "floor_cycles_per_element": round(floor.cycles, 4), "floor_unit": floor.unit,
            "unavoidable_instructions_per_element": unavoidable,
        }  # fmt: skip


def compile_entry(entry: Entry, dtype: str, head_dim: int, arch: int, precision: str = "ieee") -> list[Row]:
    """Compiles the kernels one call of an operation launches, forward and backward.

    Args:
        precision: of products of float32, "ieee" or "tf32".

    Raises:
        ValueError: an architecture without tables, or a dtype or head_dim the kernels do not take.
        RuntimeError: triton interprets kernels in this process.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    grid = GRID if entry.operation in ("attention_mass", "frame_local_attention") else GRID.without_text()
    q = meta_heads(HEADS, grid.tokens, head_dim, DTYPES[dtype])
    with float32_precision(precision), recording(arch) as compiled:
        backward = _FORWARDS[entry.operation](entry.heads, q, grid)
        count = len(compiled)
        if backward is not None:
            backward()
    unique: dict[tuple[str, str], Row] = {}
    for index, one in enumerate(compiled):
        pass_name = "forward" if index < count else "backward"
        row = Row(entry.operation, pass_name, entry.heads, dtype, head_dim, arch, one)
        unique.setdefault((pass_name, one.kernel), row)
    return list(unique.values())


def _soft_displacement(heads: str, q: Tensor, grid: TokenGrid) -> Callable[[], object]:
    """Each of these makes the forward pass of an operation, and gives the backward pass where there is one."""
    folded = heads == "logits"
    options = (_PAIRS, grid.height, grid.width, folded, 0.18, -1, product_precision())
    moved, sums, *_ = compute_soft_displacement(q, q, None, None, None, *options)
    fixed = (torch.empty_like(moved), q, q, None, None, None, moved, sums)
    return lambda: compute_soft_displacement_backward(*fixed, *options, [True, True])


def _hard_displacement(heads: str, q: Tensor, grid: TokenGrid) -> None:
    compute_hard_displacement(
        q, q, None, None, None, _PAIRS, grid.height, grid.width, heads, 0.12, -1, product_precision()
    )


def _match(heads: str, q: Tensor, grid: TokenGrid) -> None:
    compute_match(q, q, None, None, _PAIRS, grid.height, grid.width, heads, 0.12, True, 1, product_precision())


def _cost_rows(heads: str, q: Tensor, grid: TokenGrid) -> None:
    tokens = torch.empty(64, dtype=torch.int64, device="meta")
    compute_cost_rows(q, q, tokens, None, None, 0, grid.height, grid.width, heads, 0.12, True, product_precision())


def _attention_mass(heads: str, q: Tensor, grid: TokenGrid) -> None:
    tokens = torch.empty(64, dtype=torch.int64, device="meta")
    compute_attention_mass(
        q, q, tokens, None, None, 0, grid.text_tokens, grid.video_start, grid.frames, 0, heads, 0.12,
        product_precision(),
    )  # fmt: skip


def _frame_local_attention(heads: str, q: Tensor, grid: TokenGrid) -> Callable[[], object]:
    options = (list(LocalLayout.of(grid, 0)), 0.18, heads == "renormalized", product_precision())
    attended, sums, *_ = compute_frame_local_attention(q, q, q, None, *options)
    return lambda: compute_frame_local_attention_backward(
        q, q, q, q, None, attended, sums, *options, [True, True]
    )


_FORWARDS: dict[str, Callable[[str, Tensor, TokenGrid], Callable[[], object] | None]] = {
    "soft_displacement": _soft_displacement,
    "hard_displacement": _hard_displacement,
    "match": _match,
    "cost_rows": _cost_rows,
    "attention_mass": _attention_mass,
    "frame_local_attention": _frame_local_attention,
}


class Request(NamedTuple):
    """What `compile_entry` takes."""

    entry: Entry
    dtype: str
    head_dim: int
    arch: int


def requests(
    arches: list[int], dtypes: list[str], head_dims: list[int], operations: list[str] | None = None
) -> Iterator[Request]:
    """All entries (or those of the named operations) on each architecture, in each dtype and head_dim.

    Raises:
        ValueError: an operation that does not exist.
    """
    for name in operations or []:
        if name not in _HEADS:
            raise ValueError(f"no operation is called {name!r}; there are {', '.join(sorted(_HEADS))}")
    chosen = [entry for entry in ENTRIES if operations is None or entry.operation in operations]
    for arch, dtype, head_dim, entry in itertools.product(arches, dtypes, head_dims, chosen):
        yield Request(entry, dtype, head_dim, arch)


def sources() -> str:
    """A digest of the kernels' source files: results of the same sources and triton need not be compiled again."""
    digest = hashlib.sha256(triton.__version__.encode())
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
