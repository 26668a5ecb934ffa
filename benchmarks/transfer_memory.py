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
from corrdit.benchmark.measure import peak_extra_bytes, time_interleaved
from corrdit.memory import is_out_of_memory

SHAPES = {
    "cpu": [(12, 64, 6, 30, 45), (12, 64, 3, 30, 45), (12, 64, 12, 30, 45)],
    "cuda": [(48, 64, 13, 30, 45), (48, 64, 6, 30, 45)],
}
TEMPERATURE = 2.0
WAYS = ("ours", "released", "folded")
BAR_MEGABYTES, BAR_SPEEDUP = 300, 6


def materialised_flow(q: Tensor, k: Tensor, grid: TokenGrid, *, fold: bool) -> Tensor:
    """The motion flow from whole maps: every head's logits averaged ("released"), or one product of folded heads."""
    heads, _, channels = q.shape[1:]
    if fold:
        joined = [tensor[0].transpose(0, 1).flatten(1) for tensor in (q, k)]
        logits = joined[0] @ joined[1].T / (heads * channels**0.5)
    else:
        logits = (q[0] @ k[0].transpose(1, 2) / channels**0.5).mean(0)
    weights = (TEMPERATURE * logits).unflatten(1, (grid.frames, -1)).softmax(-1)
    place = grid.coordinates(q.device, q.dtype)
    own = place.repeat(grid.frames, 1)[:, None]
    flow = weights @ place - own
    return flow.unflatten(0, (grid.frames, -1)).transpose(1, 2).unflatten(2, (grid.height, grid.width))[None]


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
        if way == "ours":
            loss = motion.attention_flow_loss(q, k, grid, wanted, temperature=TEMPERATURE)
        else:
            loss = motion.flow_loss(materialised_flow(q, k, grid, fold=way == "folded"), wanted)
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
    ours, released = rows[0], rows[1]
    checks = {}
    if "failed" not in released:
        for key in ("loss", "gradient_norm"):
            if abs(ours[key] - released[key]) > 1e-3 * abs(released[key]):
                raise SystemExit(f"{key} differs: {ours[key]} and {released[key]}; the times mean nothing")
        if device.type == "cpu":
            speedup = released["seconds"] / ours["seconds"]
            fits = ours["extra_megabytes"] <= BAR_MEGABYTES
            checks = {"memory_bar_met": fits, "speedup": speedup, "speed_bar_met": speedup >= BAR_SPEEDUP}
    print(json.dumps(checks))
    if arguments.output is not None:
        write_json(arguments.output, {**facts(device), "rows": rows, "checks": checks})


if __name__ == "__main__":
    main()
