"""Memory and time of the motion flow loss, forward and backward, ours against the released way.

    python benchmarks/transfer_memory.py --output benchmarks/results/transfer_memory.json

On the CPU at 6 frames of 30 x 45 tokens with 12 heads of 64, at half and twice the tokens too, for how memory grows;
on a GPU (--device cuda) at 13 frames of 30 x 45 tokens with 48 heads of 64. Memory is the allocator's peak above the
inputs. Bars on the CPU: at most 300 MB extra and at least 6 times faster than the released way, which makes every
head's map of all tokens.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import torch
from experiment import Record, facts, new_parser, write_json
from torch import Tensor

from corrdit import TokenGrid, motion
from corrdit.benchmark.baselines import folded_chunks, materialized
from corrdit.benchmark.measure import peak_extra_bytes, time_interleaved
from corrdit.memory import is_out_of_memory

SHAPES = {
    "cpu": [(12, 64, 6, 30, 45), (12, 64, 3, 30, 45), (12, 64, 12, 30, 45)],
    "cuda": [(48, 64, 13, 30, 45), (48, 64, 6, 30, 45)],
}
TEMPERATURE = 2.0
BAR_MEGABYTES, BAR_SPEEDUP = 300, 6


def ours(q: Tensor, k: Tensor, grid: TokenGrid, wanted: Tensor) -> Tensor:
    return motion.attention_flow_loss(q, k, grid, wanted, temperature=TEMPERATURE)


def released(q: Tensor, k: Tensor, grid: TokenGrid, wanted: Tensor) -> Tensor:
    return motion.flow_loss(materialized.soft_displacement(q, k, grid, temperature=TEMPERATURE), wanted)


def folded(q: Tensor, k: Tensor, grid: TokenGrid, wanted: Tensor) -> Tensor:
    return motion.flow_loss(folded_chunks.soft_displacement(q, k, grid, temperature=TEMPERATURE), wanted)


WAYS = {"ours": ours, "released": released, "folded": folded}


def step(way: str, shape: tuple[int, ...], device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that gives a loss and its gradient in q."""
    heads, channels, frames, height, width = shape
    grid = TokenGrid(frames, height, width)
    source = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k = (torch.randn(1, heads, grid.tokens, channels, generator=source).to(device, dtype) for _ in range(2))
    q, k = q.requires_grad_(True), k.requires_grad_(True)
    wanted = torch.randint(-5, 6, (1, frames, frames, height, width, 2), generator=source).to(device)

    def work() -> tuple[Tensor, Tensor]:
        loss = WAYS[way](q, k, grid, wanted)
        return loss.detach(), torch.autograd.grad(loss, (q, k))[0]

    return work


def measure(way: str, shape: tuple[int, ...], device: torch.device, repeats: int) -> Record:
    """Highest memory above the inputs, and the median time of a step; what it died of where there is not enough."""
    row: Record = {"way": way, "shape": list(shape)}
    work = step(way, shape, device)
    try:
        step(way, (*shape[:2], 2, 4, 4), device)()  # warms up
        extra = peak_extra_bytes(lambda: work()[:1], device)
        loss, gradient = work()
        times, failures = time_interleaved({way: work}, device, {way: repeats})
        if failures:
            raise failures[way]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {**row, "failed": str(error)}
    return {
        **row,
        "extra_megabytes": extra / 2**20,
        "seconds": times[way].median / 1e3,
        "spread": (times[way].most - times[way].least) / 1e3,
        "loss": float(loss),
        "gradient_norm": float(gradient.double().norm()),
    }


def main() -> None:
    parser = new_parser(__doc__, output=False)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--shape", type=int, nargs=5, help="this one only: heads, head_dim, frames, rows, columns")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    first, *others = [tuple(arguments.shape)] if arguments.shape else SHAPES[arguments.device]
    rows = []
    for way, shape in [*((way, first) for way in WAYS), *(("ours", shape) for shape in others)]:
        rows.append(measure(way, shape, device, arguments.repeats))
        print(rows[-1], flush=True)
    own, other = rows[:2]
    checks = {}
    if "failed" not in other:
        for key in ("loss", "gradient_norm"):
            if abs(own[key] - other[key]) > 1e-3 * abs(other[key]):
                raise SystemExit(f"{key} differs: {own[key]} and {other[key]}; the times mean nothing")
        if device.type == "cpu":
            speedup = other["seconds"] / own["seconds"]
            fits = own["extra_megabytes"] <= BAR_MEGABYTES
            checks = {"memory_bar_met": fits, "speedup": speedup, "speed_bar_met": speedup >= BAR_SPEEDUP}
    print(json.dumps(checks))
    if arguments.output is not None:
        write_json(arguments.output, {**facts(device), "rows": rows, "checks": checks})


if __name__ == "__main__":
    main()
