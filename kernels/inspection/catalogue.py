"""Every kernel with the inputs that select it, for compiling all of them ahead of time."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from corrdit.arguments import choice
from corrdit.grid import TokenGrid
from corrdit.kernels.displacement.folded import visited_scores
from corrdit.kernels.displacement.soft import compute_soft_displacement, compute_soft_displacement_backward
from corrdit.kernels.frame_local.attention import compute_frame_local_attention, compute_frame_local_attention_backward
from corrdit.kernels.frame_local.layout import stretches
from corrdit.kernels.inspection.ahead_of_time import ARCHITECTURES, Compiled, meta_heads, recording
from corrdit.kernels.inspection.floors import soft_floor
from corrdit.kernels.matching.costs import compute_cost_rows
from corrdit.kernels.matching.hard import compute_hard_displacement
from corrdit.kernels.matching.mass import compute_attention_mass, mass_segments
from corrdit.kernels.matching.match import compute_match
from corrdit.kernels.shared.tables import whole_frames
from corrdit.problem import TokenAxis, float32_precision, product_precision

# CogVideoX-5B.
HEADS = 48
GRID = TokenGrid(frames=13, height=30, width=45, text_tokens=226)
# CogVideoX1.5, Wan and HunyuanVideo at 720p: 3,600 tokens are a multiple of 16, of which triton makes other code.
LARGE_FRAME = (45, 80)
WINDOW = 4
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HEAD_DIMS = (16, 64, 96, 128, 256)
PLAIN, MASK, WINDOWED, WEIGHTS, LARGE = "plain", "mask", "window", "weights", "large frame"
VARIANTS = (PLAIN, MASK, WINDOWED, WEIGHTS, LARGE)


class Entry(NamedTuple):
    """One call of an operation.

    Attributes:
        heads: its head mode, or "renormalized" or "zeroed" of frame-local attention.
        variant: what the call has besides: a key mask, a window, weights of the heads, frames of 45 x 80 tokens.
    """

    operation: str
    heads: str
    variant: str = PLAIN


class Inputs(NamedTuple):
    """Tensors without memory for one entry."""

    q: Tensor
    grid: TokenGrid
    heads: str
    weights: Tensor | None
    key_mask: Tensor | None
    window: int

    @property
    def pairs(self) -> list[int]:
        """Every pair of frames, flat."""
        frames = range(self.grid.frames)
        return [frame for i in frames for j in frames for frame in (i, j)]

    @property
    def places(self) -> tuple[list[int], list[int], int, int]:
        """What q and k hold of every frame, height and width."""
        whole = whole_frames(self.grid.frames, self.grid.tokens_per_frame)
        return whole, whole, self.grid.height, self.grid.width


_HEADS = {
    "soft_displacement": ("none", "logits"),
    "hard_displacement": ("none", "logits", "probabilities"),
    "match": ("logits", "probabilities"),
    "cost_rows": ("probabilities",),
    "attention_mass": ("probabilities",),
    "frame_local_attention": ("renormalized", "zeroed"),
}


def _has_variant(operation: str, heads: str, variant: str) -> bool:
    if variant == WINDOWED:
        return operation.endswith("displacement")
    return variant != WEIGHTS or heads == "logits"


ENTRIES = tuple(
    Entry(operation, heads, variant)
    for operation, modes in _HEADS.items()
    for heads in modes
    for variant in VARIANTS
    if _has_variant(operation, heads, variant)
)


class Row(NamedTuple):
    """One compiled kernel of one entry, as `corrdit kernels` prints it."""

    op: str
    pass_name: str
    heads: str
    variant: str
    dtype: str
    head_dim: int
    arch: int
    compiled: Compiled
    tile_use: float

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
            "variant": self.variant,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "arch": self.arch,
            "kernel": compiled.kernel,
            "tiles": list(compiled.tiles),
            **{name: getattr(compiled, name) for name in ("registers", "spill_bytes", "shared_bytes")},
            **{name: getattr(compiled, name) for name in ("launchable", "tensor_cores")},
            "serialized_products": compiled.serialized,
            "repetition": compiled.repetition,
            "resident_blocks": compiled.resident_blocks,
            "overlap": compiled.main_loop and compiled.main_loop.overlap,
            "tile_use": round(self.tile_use, 3),
            "wave_use": round(compiled.wave_use, 3),
            "triton": triton.__version__,
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
    if entry.variant == LARGE:
        grid = replace(grid, height=LARGE_FRAME[0], width=LARGE_FRAME[1])
    q = meta_heads(HEADS, grid.tokens, head_dim, DTYPES[dtype])
    inputs = Inputs(
        q, grid, entry.heads,
        torch.empty(HEADS, device="meta") if entry.variant == WEIGHTS else None,
        torch.empty(1, grid.tokens, dtype=torch.bool, device="meta") if entry.variant == MASK else None,
        WINDOW if entry.variant == WINDOWED else -1,
    )  # fmt: skip
    with float32_precision(precision), recording(arch) as compiled:
        backward = _FORWARDS[entry.operation](inputs)
        count = len(compiled)
        if backward is not None:
            backward()
    unique: dict[tuple[str, str], Row] = {}
    for index, one in enumerate(compiled):
        pass_name = "forward" if index < count else "backward"
        use = tile_use(grid, one, entry.variant == WINDOWED)
        row = Row(entry.operation, pass_name, entry.heads, entry.variant, dtype, head_dim, arch, one, use)
        unique.setdefault((pass_name, one.kernel), row)
    return list(unique.values())


def tile_use(grid: TokenGrid, compiled: Compiled, windowed: bool) -> float:
    """Share of the scores in the tiles of a launch that are scores of a query and a key, for whole frames."""
    tokens, (rows, columns, *_) = grid.tokens_per_frame, compiled.tiles
    if compiled.kernel == "folded_forward" and not windowed:
        return tokens * tokens * grid.frames / visited_scores(tokens * grid.frames, tokens, compiled.tiles)
    return tokens**2 / (-(-tokens // rows) * rows * -(-tokens // columns) * columns)


def _soft_displacement(inputs: Inputs) -> Callable[[], object]:
    """Each of these makes the forward pass of an operation, and gives the backward pass where there is one."""
    q, k, weights, mask = inputs.q, inputs.q, inputs.weights, inputs.key_mask
    options = (inputs.pairs, *inputs.places, inputs.heads == "logits", 0.18, inputs.window, product_precision())
    moved, sums = compute_soft_displacement(q, k, weights, mask, None, *options)
    gradient = torch.empty_like(moved)
    return lambda: compute_soft_displacement_backward(
        gradient, None, q, k, weights, mask, None, moved, sums, *options, [True, True]
    )


def _hard_displacement(inputs: Inputs) -> None:
    compute_hard_displacement(
        inputs.q, inputs.q, inputs.weights, inputs.key_mask, None, inputs.pairs, *inputs.places,
        inputs.heads, 0.12, inputs.window, product_precision(),
    )  # fmt: skip


def _match(inputs: Inputs) -> None:
    compute_match(
        inputs.q, inputs.q, inputs.weights, inputs.key_mask, inputs.pairs[2 : 2 * inputs.grid.frames], *inputs.places,
        inputs.heads, 0.12, True, 1, product_precision(),
    )  # fmt: skip


def _cost_rows(inputs: Inputs) -> None:
    tokens = torch.empty(64, dtype=torch.int64, device="meta")
    compute_cost_rows(
        inputs.q, inputs.q, tokens, inputs.weights, inputs.key_mask, 0, *inputs.places,
        inputs.heads, 0.12, True, product_precision(),
    )  # fmt: skip


def _attention_mass(inputs: Inputs) -> None:
    tokens, axis = torch.empty(64, dtype=torch.int64, device="meta"), TokenAxis.of_grid(inputs.grid)
    compute_attention_mass(
        inputs.q, inputs.q, tokens, inputs.weights, inputs.key_mask, axis.frames[0].origin,
        mass_segments(axis, inputs.grid.frames), inputs.heads, 0.12, product_precision(),
    )  # fmt: skip


def _frame_local_attention(inputs: Inputs) -> Callable[[], object]:
    q, mask = inputs.q, inputs.key_mask
    place = stretches(TokenAxis.of_grid(inputs.grid), inputs.grid.frames)
    options = (place, place, 0, 0.18, inputs.heads == "renormalized", product_precision())
    attended, sums, *_ = compute_frame_local_attention(q, q, q, mask, *options)
    return lambda: compute_frame_local_attention_backward(
        q, None, q, q, q, mask, attended, sums, *options, [True] * 3
    )  # fmt: skip


_FORWARDS: dict[str, Callable[[Inputs], Callable[[], object] | None]] = {
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
    arches: list[int],
    dtypes: list[str],
    head_dims: list[int],
    operations: list[str] | None = None,
    variants: list[str] | None = None,
) -> Iterator[Request]:
    """All entries (or those of the named operations and variants) on each architecture, in each dtype and head_dim.

    Raises:
        ValueError: an operation or a variant that does not exist.
    """
    for name in variants or []:
        choice("variant", name, VARIANTS)
    for name in operations or []:
        if name not in _HEADS:
            raise ValueError(f"no operation is called {name!r}; there are {', '.join(sorted(_HEADS))}")
    chosen = [
        entry
        for entry in ENTRIES
        if (operations is None or entry.operation in operations) and (variants is None or entry.variant in variants)
    ]
    for arch, dtype, head_dim, entry in itertools.product(arches, dtypes, head_dims, chosen):
        yield Request(entry, dtype, head_dim, arch)


def sources() -> str:
    """A digest of the kernels' source files: results of the same sources and triton need not be compiled again."""
    digest = hashlib.sha256(triton.__version__.encode())
    root = pathlib.Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
