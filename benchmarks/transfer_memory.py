"""Memory and time of the motion flow loss, forward and backward, ours against the released way.

    python benchmarks/transfer_memory.py --output benchmarks/results/transfer_memory.json

On the CPU at 6 frames of 30 x 45 tokens with 12 heads of 64, each way in a process of its own, whose highest memory
above its inputs is read from the operating system; at half and twice the tokens too, for how memory grows. Bars: at
most 300 MB extra and at least 6 times faster than the released way, which makes every head's map of all tokens. On a
GPU (--device cuda) at 13 frames of 30 x 45 tokens with 48 heads of 64, by the allocator's own count.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from corrdit import TokenGrid, motion

SHAPES = {
    "cpu": [(12, 64, 6, 30, 45), (12, 64, 3, 30, 45), (12, 64, 12, 30, 45)],
    "cuda": [(48, 64, 13, 30, 45), (48, 64, 6, 30, 45)],
}
TEMPERATURE = 2.0
WAYS = ("ours", "released", "folded")
BAR_MEGABYTES, BAR_SPEEDUP = 300, 6


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=None, help="JSON file to write")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--way", choices=WAYS, default=None, help="measure this one in this process (used by itself)")
    parser.add_argument(
        "--shape", type=int, nargs=5, default=None, help="with --way: heads, head_dim, frames, rows, columns"
    )
    return parser.parse_args()


def materialised_flow(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, *, fold: bool) -> torch.Tensor:
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


def step(
    way: str, q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, wanted: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Loss and its gradient in q."""
    if way == "ours":
        loss = motion.attention_flow_loss(q, k, grid, wanted, temperature=TEMPERATURE)
    else:
        loss = motion.flow_loss(materialised_flow(q, k, grid, fold=way == "folded"), wanted)
    gradient, _ = torch.autograd.grad(loss, (q, k))
    return float(loss.detach()), gradient


def measure(way: str, shape: tuple[int, ...], device: str, repeats: int) -> dict[str, Any]:
    """One way in this process: highest memory above the inputs, and the median time of a step."""
    heads, channels, frames, height, width = shape
    grid = TokenGrid(frames, height, width)
    source = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k = (torch.randn(1, heads, grid.tokens, channels, generator=source).to(device, dtype) for _ in range(2))
    q, k = q.requires_grad_(True), k.requires_grad_(True)
    wanted = torch.randint(-5, 6, (1, frames, frames, height, width, 2), generator=source).to(device)
    small = TokenGrid(2, 4, 4)
    part = [tensor.detach()[:, :, : small.tokens].requires_grad_(True) for tensor in (q, k)]
    step(way, *part, small, torch.ones(1, 2, 2, 4, 4, 2, dtype=torch.int64, device=device))
    before = held(device)
    times, loss, gradient = [], 0.0, q
    for _ in range(repeats):
        began = time.perf_counter()
        loss, gradient = step(way, q, k, grid, wanted)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {
        "way": way,
        "shape": list(shape),
        "extra_megabytes": (peak(device) - before) / 2**20,
        "seconds": statistics.median(times),
        "spread": max(times) - min(times),
        "loss": loss,
        "gradient_norm": float(gradient.double().norm()),
    }


def held(device: str) -> int:
    """Bytes in use before the measurement; on the CPU the process's memory now, which is its highest so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(way: str, shape: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--shape", *map(str, shape), "--device", arguments.device]
    command += ["--repeats", str(arguments.repeats)]
    if arguments.threads is not None:
        command += ["--threads", str(arguments.threads)]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"ended with status {found.returncode}"])[-1]
        return {"way": way, "shape": list(shape), "failed": reason}
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    arguments = parsed_arguments()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.way is not None:
        print(json.dumps(measure(arguments.way, tuple(arguments.shape), arguments.device, arguments.repeats)))
        return
    rows = []
    for shape in SHAPES[arguments.device]:
        for way in WAYS if shape is SHAPES[arguments.device][0] else ("ours",):
            rows.append(in_own_process(way, shape, arguments))
            print(rows[-1])
    ours, released = rows[0], rows[1]
    for key in ("loss", "gradient_norm"):
        if "failed" not in released and abs(ours[key] - released[key]) > 1e-3 * abs(released[key]):
            raise SystemExit(f"{key} differs: {ours[key]} and {released[key]}; the times mean nothing")
    checks = {}
    if arguments.device == "cpu" and "failed" not in released:
        checks = {
            "memory_bar_met": ours["extra_megabytes"] <= BAR_MEGABYTES,
            "speedup": released["seconds"] / ours["seconds"],
            "speed_bar_met": released["seconds"] / ours["seconds"] >= BAR_SPEEDUP,
        }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "device": arguments.device,
    }
    result = json.dumps({**facts, "rows": rows, "checks": checks}, indent=1)
    print(json.dumps(checks))
    if arguments.output is not None:
        pathlib.Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(arguments.output).write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
