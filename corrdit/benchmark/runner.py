"""Runs contests: correctness first, then times in turns, then memory; one row for each competitor and pass."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from corrdit.benchmark.contests import CONTESTS, Contest, Results, Rival, Scene
from corrdit.benchmark.environment import environment
from corrdit.benchmark.measure import Ceilings, Work, measure_ceilings, peak_extra_bytes, time_interleaved
from corrdit.benchmark.shapes import Shape
from corrdit.files import written_beside
from corrdit.grid import TokenGrid

# Largest error over largest value. Half precision rounds logits of the rivals; ours must stay far below this, and the
# error stands in the row.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Share of argmaxes that may differ: near ties are decided by the last bit.
MISMATCHES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
CHECKED_FRAMES = 2

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        rounds: timed calls of each competitor.
        rivals: whether the other ways are timed as well.
        rival_bytes: rivals that need more than this for their score maps are left out, with the reason in their row.
    """

    device: torch.device
    dtype: torch.dtype
    backends: tuple[str, ...]
    rounds: int
    rivals: bool
    rival_bytes: float


def run_contests(names: Sequence[str], shapes: Sequence[Shape], settings: Settings) -> Iterator[Row]:
    """The rows of some contests over some shapes, each as soon as it is there."""
    ceilings = measure_ceilings(settings.device, settings.dtype)
    where = {**environment(settings.device), "dtype": str(settings.dtype).removeprefix("torch.")}
    common = {**where, **dataclasses.asdict(ceilings)}
    for name in names:
        for shape in shapes:
            for row in _run_contest(CONTESTS[name], shape, settings, ceilings):
                yield {"operation": name, **row, "shape": dataclasses.asdict(shape), **common}


def _run_contest(contest: Contest, shape: Shape, settings: Settings, ceilings: Ceilings) -> Iterator[Row]:
    runs: dict[str, Callable[[Scene], Results]] = {}
    for backend in settings.backends:
        runs[f"corrdit {backend}"] = lambda scene, backend=backend: contest.run(scene, backend)  # type: ignore[misc]
    refused = {}
    for name, rival in contest.rivals.items() if settings.rivals else ():
        reason = _refusal(rival, shape, settings)
        if reason:
            refused[name] = reason
        else:
            runs[name] = rival.run
    for backward in (False, True) if contest.backward_products is not None else (False,):
        label = {"pass": "forward and backward" if backward else "forward"}
        errors = {name: _error(contest, run, shape, settings, backward) for name, run in runs.items()}
        wrong = {name: error for name, error in errors.items() if not error["within_tolerance"]}
        scene = _scene(shape, shape.grid, settings, gradient=backward)
        works = {name: _work(run, scene, backward) for name, run in runs.items() if name not in wrong}
        times = time_interleaved(works, settings.device, settings.rounds) if works else {}
        floor = contest.products(shape) * (1 + (contest.backward_products or 0) * backward) / 1e9
        for name, error in errors.items():
            row: Row = {"competitor": name, **label, **error}
            about = contest.rivals[name].about if name in contest.rivals else None
            if about is not None:
                row["about"] = about(scene)
            if name in wrong:
                row["left_out"] = "the result is wrong, so it has no time"
            else:
                row["milliseconds"] = dataclasses.asdict(times[name])
                row["extra_bytes"] = peak_extra_bytes(works[name], settings.device)
                row["share_of_matmul_ceiling"] = floor / ceilings.matmul_tflops / times[name].median
            yield row
        for name, reason in refused.items():
            yield {"competitor": name, **label, "left_out": reason}


def _refusal(rival: Rival, shape: Shape, settings: Settings) -> str | None:
    if rival.device not in (None, settings.device.type):
        return f"runs on {rival.device} only"
    needed = rival.held_bytes(shape, settings.dtype.itemsize)
    if needed > settings.rival_bytes:
        return f"needs {needed / 2**30:.0f} GiB for its score maps"
    return None


def _scene(shape: Shape, grid: TokenGrid, settings: Settings, *, gradient: bool) -> Scene:
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.heads, grid.tokens, shape.head_dim)
    tensors = (torch.randn(size, generator=generator).to(settings.device, settings.dtype) for _ in range(3))
    return Scene(grid, *(tensor.requires_grad_(gradient) for tensor in tensors))


def _work(run: Callable[[Scene], Results], scene: Scene, backward: bool) -> Work:
    if not backward:
        return lambda: run(scene)
    with torch.no_grad():
        result = run(scene)[0]
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(result.shape, generator=generator).to(result.device, result.dtype)
    inputs = (scene.q, scene.k, scene.v)

    def forward_and_backward() -> Results:
        (output,) = run(scene)
        gradients = torch.autograd.grad(output, inputs, incoming, allow_unused=True)
        return (output, *(gradient for gradient in gradients if gradient is not None))

    return forward_and_backward


def _error(contest: Contest, run: Callable[[Scene], Results], shape: Shape, settings: Settings, backward: bool) -> Row:
    """Largest error of a competitor on the first frames, against float64 by the streaming backend."""
    grid = dataclasses.replace(shape.grid, frames=min(CHECKED_FRAMES, shape.frames))
    scene = _scene(shape, grid, settings, gradient=backward)
    exact_scene = Scene(
        grid, *(tensor.detach().double().requires_grad_(backward) for tensor in (scene.q, scene.k, scene.v))
    )
    results = _work(run, scene, backward)()
    expected = _work(lambda s: contest.run(s, "streaming"), exact_scene, backward)()
    error, mismatches = 0.0, 0.0
    for result, exact in zip(results, expected, strict=True):
        if _is_position(exact):
            mismatches = max(mismatches, _mismatch_share(result, exact))
        else:
            largest = float(exact.detach().abs().max())
            error = max(error, float((result.detach().double() - exact.detach()).abs().max()) / max(largest, 1e-30))
    good = error <= TOLERANCE[settings.dtype] and mismatches <= MISMATCHES[settings.dtype]
    return {"error": error, "mismatches": mismatches, "within_tolerance": good}


def _is_position(exact: Tensor) -> bool:
    """Whether a result counts tokens: argmaxes are right or wrong, not near."""
    return not exact.requires_grad and exact.shape[-1] == 2 and bool((exact == exact.round()).all())


def _mismatch_share(result: Tensor, exact: Tensor) -> float:
    return float((result.double() != exact.double()).any(-1).double().mean())


def write_rows(path: str | os.PathLike[str], command: str, rows: Sequence[Row]) -> None:
    """Results as one JSON object: the command and the rows."""
    with written_beside(path, "w") as file:
        json.dump({"command": command, "rows": list(rows)}, file, indent=1)
        file.write("\n")
