"""The streaming backend on a CPU against scores of all heads held at once, as DiTFlow's released code does.

Soft displacement, averaged logits, forward and backward. Correctness is checked first; then both ways are timed in
turns, and the peak of the memory of each is read from the operating system in a process of its own.

    .venv/bin/python benchmarks/streaming.py --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from corrdit import TokenGrid, ops
from corrdit.benchmark.baselines import folded_chunks, materialized
from corrdit.benchmark.environment import environment
from corrdit.benchmark.measure import Times
from corrdit.files import written_beside

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
WAYS: dict[str, Callable[[Tensor, Tensor, TokenGrid], Tensor]] = {
    "streaming": lambda q, k, grid: ops.soft_displacement(q, k, grid, backend="streaming"),
    "materialized": materialized.soft_displacement,
    "folded chunks": folded_chunks.soft_displacement,
}


def inputs(arguments: argparse.Namespace, frames: int) -> tuple[TokenGrid, Tensor, Tensor, Tensor]:
    """Grid, q, k and the incoming gradient."""
    grid = TokenGrid(frames, arguments.height, arguments.width)
    generator = torch.Generator().manual_seed(0)
    size = (1, arguments.heads, grid.tokens, arguments.head_dim)
    q, k = (torch.randn(size, generator=generator).requires_grad_() for _ in range(2))
    return grid, q, k, torch.randn(1, frames, frames, grid.height, grid.width, 2, generator=generator)


def check(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Largest error over largest value of result, dq and dk on two frames, against the float64 reference."""
    grid, q, k, incoming = inputs(arguments, 2)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (q, k)]
    exact = ops.soft_displacement(*exact_inputs, grid, backend="reference")
    expected = (exact, *torch.autograd.grad(exact, exact_inputs, incoming.double()))
    errors = {}
    for name, way in WAYS.items():
        moved = way(q, k, grid)
        results = (moved, *torch.autograd.grad(moved, (q, k), incoming))
        errors[name] = [
            float((result.double() - truth).detach().abs().max() / truth.detach().abs().max())
            for result, truth in zip(results, expected, strict=True)
        ]
        tolerances = (TOLERANCE, GRADIENT_TOLERANCE, GRADIENT_TOLERANCE)
        if any(error > tolerance for error, tolerance in zip(errors[name], tolerances, strict=True)):
            raise SystemExit(f"{name} is wrong by {errors[name]}: nothing is timed")
    return errors


def timed(arguments: argparse.Namespace) -> dict[str, dict[str, Times]]:
    """Forward and backward times of every way, measured in turns, and processor seconds of both passes together.

    Processor seconds of one thread hardly change with what else the machine does; of several threads that wait for
    each other on a busy machine they do.
    """
    grid, q, k, incoming = inputs(arguments, arguments.frames)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "backward": [], "both": [], "processor": []} for name in WAYS
    }
    for number in range(arguments.rounds + 1):
        for name, way in WAYS.items():
            start, processor = time.perf_counter(), time.process_time()
            moved = way(q, k, grid)
            middle = time.perf_counter()
            torch.autograd.grad(moved, (q, k), incoming)
            stop = time.perf_counter()
            if number:  # the first round warms up
                of_way = seconds[name]
                of_way["forward"].append(middle - start)
                of_way["backward"].append(stop - middle)
                of_way["both"].append(stop - start)
                of_way["processor"].append(time.process_time() - processor)
                print(f"round {number} {name}: {middle - start:.2f} s + {stop - middle:.2f} s", flush=True)
    return {name: {part: Times.of(values) for part, values in parts.items()} for name, parts in seconds.items()}


def resident_bytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found.group(1)) * 1024


def print_extra_bytes(arguments: argparse.Namespace) -> None:
    """Peak resident memory during forward and backward, beyond that before them and their results."""
    way = WAYS[arguments.memory_of]
    grid, q, k, incoming = inputs(arguments, 1)
    torch.autograd.grad(way(q, k, grid), (q, k), incoming)
    grid, q, k, incoming = inputs(arguments, arguments.frames)
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed would be used again and not counted
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to what is resident
    before = resident_bytes("VmRSS")
    moved = way(q, k, grid)
    results = (moved, *torch.autograd.grad(moved, (q, k), incoming))
    peak = resident_bytes("VmHWM")
    print(peak - before - sum(result.untyped_storage().nbytes() for result in results))


def extra_bytes() -> dict[str, int]:
    """The memory of every way, each in a fresh process."""
    found = {}
    for name in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1])
        print(f"{name}: {found[name] / 2**20:.1f} MiB beyond inputs and outputs", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--height", type=int, default=30)
    parser.add_argument("--width", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    parser.add_argument("--memory-of", choices=tuple(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_extra_bytes(arguments)
        return
    errors = check(arguments)
    memory = extra_bytes()
    times = timed(arguments)
    ways = {
        name: {
            "errors": errors[name],
            "extra_bytes": memory[name],
            "milliseconds": {part: dataclasses.asdict(value) for part, value in times[name].items()},
        }
        for name in WAYS
    }
    ratios = {
        name: {
            "time": times[name]["both"].median / times["streaming"]["both"].median,
            "processor_time": times[name]["processor"].median / times["streaming"]["processor"].median,
            "extra_bytes": memory[name] / memory["streaming"],
        }
        for name in WAYS
    }
    shape = {name: getattr(arguments, name) for name in ("heads", "head_dim", "frames", "height", "width")}
    report = {
        "command": " ".join(["python", "benchmarks/streaming.py", *sys.argv[1:]]),
        **environment(torch.device("cpu")),
        "load_average": pathlib.Path("/proc/loadavg").read_text(encoding="ascii").split()[:3],
        "shape": shape,
        "ways": ways,
        "times_streaming": ratios,
    }
    print(json.dumps(report["times_streaming"], indent=1))
    if arguments.output:
        with written_beside(arguments.output, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
