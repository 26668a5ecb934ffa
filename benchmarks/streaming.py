"""The streaming backend on a CPU against scores of all heads held at once, as DiTFlow's released code does.

Soft displacement, averaged logits, forward and backward. Correctness is checked first; then all ways are timed in
turns, and the peak of the memory of each is read from the allocator.

    .venv/bin/python benchmarks/streaming.py --output benchmarks/results/streaming.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable

import torch
from experiment import CPU, facts, new_parser, write_json
from torch import Tensor

from corrdit import TokenGrid, ops
from corrdit.benchmark.baselines import folded_chunks, materialized
from corrdit.benchmark.measure import Times, peak_extra_bytes

TOLERANCES = (1e-5, 1e-4, 1e-4)
WAYS: dict[str, Callable[[Tensor, Tensor, TokenGrid], Tensor]] = {
    "streaming": lambda q, k, grid: ops.soft_displacement(q, k, grid, backend="streaming"),
    "materialized": materialized.soft_displacement,
    "folded chunks": folded_chunks.soft_displacement,
}
SHAPE = {"heads": 12, "head_dim": 64, "frames": 6, "height": 30, "width": 45}


def inputs(shape: dict[str, int], frames: int) -> tuple[TokenGrid, Tensor, Tensor, Tensor]:
    """Grid, q, k and the incoming gradient."""
    grid = TokenGrid(frames, shape["height"], shape["width"])
    generator = torch.Generator().manual_seed(0)
    size = (1, shape["heads"], grid.tokens, shape["head_dim"])
    q, k = (torch.randn(size, generator=generator).requires_grad_() for _ in range(2))
    return grid, q, k, torch.randn(1, frames, frames, grid.height, grid.width, 2, generator=generator)


def check(shape: dict[str, int]) -> dict[str, list[float]]:
    """Largest error over largest value of result, dq and dk on two frames, against the float64 reference."""
    grid, q, k, incoming = inputs(shape, 2)
    exact_q, exact_k = (tensor.detach().double().requires_grad_() for tensor in (q, k))
    exact = ops.soft_displacement(exact_q, exact_k, grid, backend="reference")
    expected = (exact, *torch.autograd.grad(exact, (exact_q, exact_k), incoming.double()))
    errors = {}
    for name, way in WAYS.items():
        moved = way(q, k, grid)
        results = (moved, *torch.autograd.grad(moved, (q, k), incoming))
        errors[name] = [
            float((result.double() - truth).detach().abs().max() / truth.detach().abs().max())
            for result, truth in zip(results, expected, strict=True)
        ]
        if any(error > tolerance for error, tolerance in zip(errors[name], TOLERANCES, strict=True)):
            raise SystemExit(f"{name} is wrong by {errors[name]}: nothing is timed")
    return errors


def timed(shape: dict[str, int], rounds: int) -> dict[str, dict[str, Times]]:
    """Forward and backward times of every way, measured in turns, and processor seconds of both passes together.

    Processor seconds of one thread hardly change with what else the machine does; of several threads that wait for
    each other on a busy machine they do.
    """
    grid, q, k, incoming = inputs(shape, shape["frames"])
    parts = ("forward", "backward", "both", "processor")
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in parts} for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            start, processor = time.perf_counter(), time.process_time()
            moved = way(q, k, grid)
            middle = time.perf_counter()
            torch.autograd.grad(moved, (q, k), incoming)
            stop = time.perf_counter()
            if number:  # the first round warms up
                values = (middle - start, stop - middle, stop - start, time.process_time() - processor)
                for part, value in zip(parts, values, strict=True):
                    seconds[name][part].append(value)
                print(f"round {number} {name}: {middle - start:.2f} s + {stop - middle:.2f} s", flush=True)
    return {name: {part: Times.of(values) for part, values in parts.items()} for name, parts in seconds.items()}


def extra_bytes(shape: dict[str, int], way: Callable[[Tensor, Tensor, TokenGrid], Tensor]) -> int:
    """Peak memory of forward and backward, beyond that before them and their results."""

    def both(frames: int) -> Callable[[], tuple[Tensor, ...]]:
        grid, q, k, incoming = inputs(shape, frames)

        def work() -> tuple[Tensor, ...]:
            moved = way(q, k, grid)
            return (moved.detach(), *torch.autograd.grad(moved, (q, k), incoming))

        return work

    both(1)()  # warms up
    return peak_extra_bytes(both(shape["frames"]), CPU)


def report_of(shape: dict[str, int], arguments: argparse.Namespace) -> dict[str, object]:
    errors = check(shape)
    memory = {name: extra_bytes(shape, way) for name, way in WAYS.items()}
    for name, value in memory.items():
        print(f"{name}: {value / 2**20:.1f} MiB beyond inputs and outputs", flush=True)
    times = timed(shape, arguments.rounds)
    ours = times["streaming"]
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
            "time": times[name]["both"].median / ours["both"].median,
            "processor_time": times[name]["processor"].median / ours["processor"].median,
            "extra_bytes": memory[name] / memory["streaming"],
        }
        for name in WAYS
    }
    return {**facts(), "shape": shape, "ways": ways, "times_streaming": ratios}


def main() -> None:
    parser = new_parser(__doc__, output=False)
    for name, default in SHAPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    report = report_of({name: getattr(arguments, name) for name in SHAPE}, arguments)
    print(json.dumps(report["times_streaming"], indent=1))
    if arguments.output:
        write_json(arguments.output, report)


if __name__ == "__main__":
    main()
