"""Predicts how long every operation takes on one H200 with triton 3.6, from the work of its kernels' tiles.

    python benchmarks/predict_times.py

writes `corrdit/benchmark/predicted_times.json`, which `corrdit bench` prints beside what it measures. For every score
of its tiles (those past a frame's end too) a kernel takes the cycles of the unit that is busiest: tensor cores (2,048
multiply-adds a cycle of a multiprocessor), the exponentials (16) or the issue of instructions (128). The instructions
of a score are what the compiler reports (`benchmarks/results/kernels_two_tritons.json`), and units hide behind each
other as far as `HIDDEN` says. Each launch takes `LAUNCH_MILLISECONDS` beside. The reasons for the numbers stand in
`benchmarks/NOTES.md`.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import NamedTuple

from corrdit.benchmark.floors import QUERY_TOKENS, WINDOW
from corrdit.benchmark.predictions import FILE
from corrdit.benchmark.runner import BOTH, FORWARD
from corrdit.benchmark.shapes import SHAPES, Shape
from corrdit.files import written_beside
from corrdit.kernels.displacement.folded import visited_scores
from corrdit.kernels.displacement.folded_backward import WORKSPACE_BYTES
from corrdit.kernels.displacement.gradient_chunks import gradient_chunks
from corrdit.kernels.shared.configs import tiles as tiles_of
from corrdit.kernels.shared.tables import whole_frames
from corrdit.kernels.shared.windows import visited_pairs

MULTIPROCESSORS, CYCLES = 132, 1.83e9
TENSOR, EXPONENTIALS, ISSUE = 2048, 16, 128
# The share of a kernel's time for which its busiest unit is busy.
HIDDEN = 0.8
# The same where every product waits for its operands from the L2 cache: small tiles of the joined heads.
UNHIDDEN = 0.5
LAUNCH_MILLISECONDS = 0.01
FOLDED_TILES = tiles_of("folded_forward", "9.0", 64, 2)
# Multiply-adds a second of a plain matrix product with aligned rows and float32 sums, and bytes of a copy.
PRODUCTS, BYTES = 0.82 * 790e12 / 2, 4.3e12


class Kernel(NamedTuple):
    """One launch: tiles of (rows, columns), and what a score of them takes.

    Attributes:
        scores: of all its tiles. depth: multiply-adds of tensor cores. exponentials, instructions: of the others.
    """

    name: str
    scores: float
    depth: float
    exponentials: float
    instructions: float
    hidden: float = HIDDEN

    @property
    def milliseconds(self) -> float:
        cycles = max(self.depth / TENSOR, self.exponentials / EXPONENTIALS, self.instructions / ISSUE)
        return 1e3 * self.scores * cycles / self.hidden / (MULTIPROCESSORS * CYCLES) + LAUNCH_MILLISECONDS


def tiles(tokens: int, size: int) -> int:
    """Tokens with those that fill up the last tile."""
    return math.ceil(tokens / size) * size


def padded(shape: Shape, pairs: float, rows: int, columns: int) -> float:
    """Scores in the tiles of so many pairs of frames."""
    size = shape.grid.tokens_per_frame
    return pairs * tiles(size, rows) * tiles(size, columns)


def folded(shape: Shape) -> Kernel:
    scores = shape.frames * visited_scores(shape.grid.video_tokens, shape.grid.tokens_per_frame, FOLDED_TILES)
    return Kernel("folded_forward", scores, shape.channels + 16, 1, 8)


def folded_gradient(shape: Shape, radius: int = -1) -> list[Kernel | float]:
    size, frames, wide = shape.grid.tokens_per_frame, range(shape.frames), shape.channels
    places, pairs = whole_frames(shape.frames, size), [frame for i in frames for j in frames for frame in (i, j)]
    chunks = gradient_chunks(pairs, places, places, size, shape.height, shape.width, radius, WORKSPACE_BYTES // 2)
    scores = products = joined = 0
    for _, _, key_frames, _, first_key, stop_key, _, _, queries, keys in chunks:
        scores += queries.pieces * tiles(queries.tokens, 128) * key_frames * tiles(stop_key - first_key, 128)
        products += queries.total * keys.total
        if keys.pieces > 1:  # read and written in 16 bits, and as float32 sums that are added to others
            joined += (2 * 2 + 4 * 4) * wide * (queries.total + keys.total)
    dlogit = Kernel("folded_gradient", scores, wide + 16, 1, 10)
    joined += 2 * 2 * 2 * wide * shape.grid.video_tokens + 2 * 6 * wide * shape.grid.video_tokens
    return [dlogit, 1e3 * 2 * wide * products / PRODUCTS, 1e3 * joined / BYTES]


def per_head(shape: Shape, pairs: float) -> Kernel:
    wide = shape.head_dim > 64
    scores = shape.heads * padded(shape, pairs, 128, 128)
    return Kernel("soft_forward", scores, (128 if wide else 64) + 16, 1, 7.2 if wide else 6.4)


def per_head_gradient(shape: Shape) -> list[Kernel | float]:
    wide, pairs = shape.head_dim > 64, shape.frames**2
    depth = 2 * (128 if wide else 64) + 16
    query = shape.heads * padded(shape, pairs, 128, 64 if wide else 128)
    key = shape.heads * padded(shape, pairs, 32 if wide else 64, 128)
    return [
        Kernel("soft_backward_query", query, depth, 1, 6.8 if wide else 5.5),
        Kernel("soft_backward_key", key, depth, 1, 14.0 if wide else 8.0),
    ]


def windowed(shape: Shape) -> Kernel:
    """8 x 8 queries with the 8 x 8 keys that their windows reach."""
    chosen = tiles_of("folded_forward_window", "9.0", shape.head_dim, 2)
    scores = shape.frames**2 * visited_pairs(shape.height, shape.width, WINDOW, chosen)
    return Kernel("folded_forward_window", scores, shape.channels + 16, 1, 3.6 * shape.channels / 64, UNHIDDEN)


def matched(shape: Shape, directions: int) -> list[Kernel | float]:
    others, wide = shape.frames - 1, shape.head_dim > 64
    scores = shape.heads * padded(shape, others, 64, 64 if wide else 128)
    cost = Kernel("best_match", scores, directions * (128 if wide else 64), directions, directions * _cost(shape))
    return [per_head(shape, directions * others), cost]


def _cost(shape: Shape) -> float:
    """Instructions of one exponential of the cost of a direction."""
    return 11.5 if shape.head_dim > 64 else 6.5


def rows_of_tokens(shape: Shape, name: str, keys: int, instructions: float) -> Kernel:
    chosen = tiles(min(QUERY_TOKENS, shape.grid.tokens_per_frame), 64)
    depth = 128 if shape.head_dim > 64 else 64
    return Kernel(name, shape.heads * chosen * tiles(keys, 128), depth, 1, instructions)


def local(shape: Shape, *, zeroed: bool, backward: bool) -> list[Kernel | float]:
    frame, text, tokens = shape.grid.tokens_per_frame, shape.text_tokens, shape.grid.tokens
    near = shape.heads * (shape.frames * tiles(frame, 128) * tiles(frame + text, 64) + tiles(text, 128) * tokens)
    far = shape.heads * tokens**2 - near if zeroed else 0
    depth = 128 if shape.head_dim > 64 else 64
    if not backward:
        far_part = [Kernel("local_forward, far", far, depth, 1, 9)] if far else []
        return [Kernel("local_forward", near, 2 * depth, 1, 10), *far_part]
    far_parts = [Kernel("local_backward, far", 2 * far, 2 * depth, 1, 12)] if far else []
    return [
        Kernel("local_backward_query", near, 3 * depth, 1, 10),
        Kernel("local_backward_key", near, 4 * depth, 1, 13),
        *far_parts,
    ]


def forward(operation: str, shape: Shape) -> list[Kernel | float]:
    """The launches of a forward pass, and milliseconds of what is no kernel of ours."""
    pairs, every = float(shape.frames**2), shape.grid.video_tokens
    if operation == "soft_displacement:logits":
        return [folded(shape)]
    if operation == "soft_displacement:probabilities":
        return [per_head(shape, pairs)]
    if operation == "soft_displacement:window":
        return [windowed(shape)]
    if operation == "hard_displacement:logits":
        return [Kernel("best_product", padded(shape, pairs, 128, 128), shape.channels, 0, 1.6 * shape.channels / 64)]
    if operation.startswith("match"):
        return matched(shape, 2 if operation.endswith("bidirectional") else 1)
    if operation == "cost_rows":
        cost = rows_of_tokens(shape, "cost_rows", every, _cost(shape))
        both = cost._replace(depth=2 * cost.depth, exponentials=2, instructions=2 * cost.instructions)
        return [rows_of_tokens(shape, "row_statistics", every, 8.5), per_head(shape, shape.frames), both]
    if operation == "attention_mass":
        return [
            rows_of_tokens(shape, name, shape.grid.tokens, instructions)
            for name, instructions in (
                ("row_statistics", 8.5),
                ("attention_mass", 5.3 if shape.head_dim <= 64 else 9.0),
            )
        ]
    return local(shape, zeroed=operation.endswith("zeroed"), backward=False)


def backward(operation: str, shape: Shape) -> list[Kernel | float] | None:
    """The same of a gradient; None where there is none."""
    if operation == "soft_displacement:probabilities":
        return per_head_gradient(shape)
    if operation in ("soft_displacement:logits", "soft_displacement:window"):
        return folded_gradient(shape, WINDOW if operation.endswith("window") else -1)
    if operation.startswith("frame_local"):
        return local(shape, zeroed=operation.endswith("zeroed"), backward=True)
    return None


OPERATIONS = (
    "soft_displacement:logits", "soft_displacement:probabilities", "soft_displacement:window",
    "hard_displacement:logits", "match:bidirectional", "match:forward", "cost_rows", "attention_mass",
    "frame_local_attention:masked", "frame_local_attention:zeroed",
)  # fmt: skip


def rows() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for shape in SHAPES.values():
        for operation in OPERATIONS:
            one, other = forward(operation, shape), backward(operation, shape)
            for passes, launches in ((FORWARD, one), (BOTH, None if other is None else [*one, *other])):
                if launches is None:
                    continue
                parts = {
                    kernel.name if isinstance(kernel, Kernel) else f"PyTorch {number}": round(
                        kernel.milliseconds if isinstance(kernel, Kernel) else kernel, 4
                    )
                    for number, kernel in enumerate(launches)
                }
                total = round(sum(parts.values()), 4)
                found.append({"operation": operation, "pass": passes, "shape": shape.name, "milliseconds": total,
                              "kernels": parts})  # fmt: skip
    return found


def main(path: pathlib.Path = FILE) -> int:
    lines = ",\n".join(json.dumps(row) for row in rows())
    facts = {"command": "python benchmarks/predict_times.py", "device": "H200", "triton": "3.6", "dtype": "16 bits"}
    with written_beside(path, "w") as file:
        file.write(json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
