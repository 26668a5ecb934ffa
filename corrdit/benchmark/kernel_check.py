"""Every kernel against the definition in float64: what a machine that has never run them is asked first.

It needs torch, triton, numpy and einops alone. On a CUDA device all cases run, at sizes of several tiles; on a CPU,
under triton's interpreter, as many of them as show every mode and option of every operation once, at a few dozen
tokens. Nearly every case compiles kernels of its own, so on a CUDA device several processes share them.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit.benchmark.kernel_cases import BRAIN, FAR, GPU_GRID, HALF, SINGLE, Case, cases
from corrdit.memory import leaves_device_unusable

# ||error|| / ||exact|| that a result and a gradient may have. A softmax weight keeps eleven bits, and so does a result
# of float16; a gradient's factors and its result are rounded to the dtype of q. The worst element may be off by
# `WORST` times as much of the largest value.
TOLERANCE = {SINGLE: (2e-6, 1e-5), HALF: (2e-3, 4e-3), BRAIN: (6e-3, 1.2e-2)}
TF32_TOLERANCE = 4e-3
# triton's interpreter cuts float32 off to bfloat16 where a GPU rounds, which is off by up to twice as much.
CUT_OFF = 2.0
WORST = 6.0
# Share of best keys that rounding may turn the other way, where two are nearly as good, or one of few tokens; and how
# many tokens off a refined place still is the same.
MISMATCHES, PLACE = 0.01, 0.05
# Each has a context of its own on the device, of half a gigabyte.
MOST_WORKERS = 8
# Of fresh inputs, each: what comes and goes is a race, or memory that nobody wrote.
DRAWS = 20
# What three tensors of two heads far apart and their copies take.
FAR_BYTES = 16e9


class Finding(NamedTuple):
    """What a case came to: `error` is the largest share of what is allowed, `wrong` says what is wrong.

    After a `fatal` one its process can do nothing more on the device.
    """

    name: str
    error: float
    wrong: str | None
    fatal: bool = False


Work = Callable[[], Finding]
"""What a process is asked for; it can be sent to one."""


def compare(case: Case, device: torch.device, run: Callable[[list[Tensor]], list[Tensor]] | None = None) -> Finding:
    """The kernels (or `run`, another way to call them) against the reference in float64."""
    inputs = case.tensors(device)
    names = [name for name in "qkv"[: len(inputs)] if case.differentiable and name in case.asked]
    exact = case.run([tensor.double() for tensor in inputs], "reference")
    mine = case.run(inputs, "triton") if run is None else run(inputs)
    worst = 0.0
    count = len(exact) - len(names)
    for index, (one, truth) in enumerate(zip(mine, exact, strict=True)):
        what = f"result {index}" if index < count else f"gradient of {names[index - count]}"
        if one.shape != truth.shape:
            return Finding(case.name, math.inf, f"{what} has shape {list(one.shape)}, not {list(truth.shape)}")
        place = case.operation == "hard_displacement" or (case.operation == "match" and index == 0)
        error = _places_off(one, truth) if place else _of_allowed(one, truth, case, gradient=index >= count)
        worst = max(worst, error)
        if not error <= 1:
            return Finding(case.name, error, f"{what} is off by {error:.3g} times what is allowed")
    return Finding(case.name, worst, None)


def _places_off(result: Tensor, exact: Tensor) -> float:
    """How many tokens have another place, as a share of the number allowed."""
    off = (result.double() - exact.double()).abs().amax(-1) > PLACE
    return float(off.double().mean()) / max(MISMATCHES, 1.5 / off.numel())


def _of_allowed(result: Tensor, exact: Tensor, case: Case, *, gradient: bool) -> float:
    """The error as a share of what is allowed; infinity where NaN or infinity stand elsewhere than in the truth."""
    allowed = TF32_TOLERANCE if case.precision == "tf32" else TOLERANCE[case.dtype][gradient]
    if case.dtype == BRAIN and result.device.type == "cpu":
        allowed *= CUT_OFF
    defined = exact.isfinite()
    if not torch.equal(result.double().masked_fill(defined & result.isfinite(), 0.0).nan_to_num(7.0, 8.0, 9.0),
                       exact.masked_fill(defined, 0.0).nan_to_num(7.0, 8.0, 9.0)):  # fmt: skip
        return math.inf
    difference = (result.double() - exact)[defined]
    exact = exact[defined]
    norm, largest = float(exact.norm()), float(exact.abs().amax()) if exact.numel() else 0.0
    if norm == 0:
        # Nothing to compare with, such as the gradient of a softmax over one key: what cancels is of the size of 1.
        return float(difference.abs().sum()) / allowed
    return max(float(difference.norm()) / norm, float(difference.abs().amax()) / largest / WORST) / allowed


def special_cases(device: torch.device) -> list[tuple[str, Work]]:
    """What only a CUDA device has: captured graphs, compiled callers, streams, races, far offsets, a second device.

    By names; each is made on the device that it is for.
    """
    if device.type != "cuda":
        return []
    # A list of tokens would be copied to the device in the capture, which CUDA refuses.
    tokens = torch.tensor([1, GPU_GRID.tokens_per_frame - 1], device=device)
    options: list[tuple[str, dict[str, Any]]] = [
        ("soft_displacement", {"heads": "none"}), ("soft_displacement", {"heads": "logits"}),
        ("soft_displacement", {"window": 2}), ("match", {"refine": 1}), ("hard_displacement", {"heads": "features"}),
        ("cost_rows", {"tokens": tokens}), ("attention_mass", {"tokens": tokens}), ("frame_local_attention", {}),
    ]  # fmt: skip
    has_room = torch.cuda.get_device_properties(device).total_memory > FAR_BYTES
    found: list[tuple[Case, Callable[[Case], Finding]]] = []
    for operation, own in options:
        about = ", ".join(name if isinstance(value, Tensor) else f"{name}={value}" for name, value in own.items())
        case = Case(operation, about or "plain", GPU_GRID, options=own)
        found.append((_about(case, "in a captured graph"), _ran(_captured, device)))
        found.append((_about(case, "beside another stream"), _ran(_beside_another_stream, device)))
        found.append((_about(case, f"{DRAWS} draws"), functools.partial(drawn_again, device=device)))
        if has_room:
            far = replace(_about(case, "heads far apart"), heads=2, layout=FAR)
            found.append((far, functools.partial(attempt, device=device)))
    for operation in ("soft_displacement", "match", "frame_local_attention"):
        found.append((Case(operation, "compiled with reduced overhead", GPU_GRID), _ran(_compiled, device)))
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        if other.index != torch.cuda.current_device():
            for operation in ("soft_displacement", "frame_local_attention"):
                case = Case(operation, f"on {other}, not current", GPU_GRID)
                found.append((case, functools.partial(attempt, device=other)))
    return [(case.name, functools.partial(how, case)) for case, how in found]


def special_finding(number: int, device: torch.device) -> Finding:
    """What one of `special_cases` came to, made in this process: tensors of a device are not sent to others."""
    return special_cases(device)[number][1]()


def _ran(run: Callable[[Case, list[Tensor]], list[Tensor]], device: torch.device) -> Callable[[Case], Finding]:
    return lambda case: attempt(case, device, functools.partial(run, case))


def _about(case: Case, what: str) -> Case:
    return replace(case, about=f"{case.about} {what}")


def drawn_again(case: Case, device: torch.device, count: int = DRAWS) -> Finding:
    """The worst of the comparisons of a case with inputs of as many seeds."""
    found = [attempt(replace(case, seed=seed), device) for seed in range(count)]
    worst = max(found, key=lambda finding: math.inf if finding.wrong else finding.error)
    return worst._replace(fatal=found[-1].fatal)


def _beside_another_stream(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """While another stream does the same with other inputs."""
    current = torch.cuda.current_stream()
    works = [(torch.cuda.Stream(), own) for own in ([torch.randn_like(tensor) for tensor in inputs], inputs)]
    for stream, _ in works:
        stream.wait_stream(current)
    results: list[Tensor] = []
    for _ in range(DRAWS):
        for stream, own in works:
            with torch.cuda.stream(stream):
                results = case.run(own, "triton")
    torch.cuda.synchronize()
    return results


def _captured(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """Captured with other inputs, replayed with these."""
    leaves = case.leaves([torch.randn_like(tensor) for tensor in inputs])
    towards = case.towards(case.call(leaves, "triton")) if case.differentiable else []

    def work() -> list[Tensor]:
        results = case.call(leaves, "triton")
        return results + (list(torch.autograd.grad(results, leaves, towards)) if towards else [])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    with torch.no_grad():
        for one, tensor in zip(leaves, inputs, strict=True):
            one.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    return [result.detach() for result in results]


def _compiled(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The third call, which replays what the second recorded."""
    call = torch.compile(lambda *leaves: case.call(leaves, "triton"), mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        leaves = case.leaves(inputs)
        results = call(*leaves)
        gradients = torch.autograd.grad(results, leaves, case.towards(results)) if case.differentiable else ()
        found = [tensor.detach().clone() for tensor in (*results, *gradients)]
    return found


def attempt(case: Case, device: torch.device, run: Callable[[list[Tensor]], list[Tensor]] | None = None) -> Finding:
    """The comparison; what a kernel dies of is wrong too, and the others go on."""
    try:
        return compare(case, device, run)
    except Exception as error:
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding(case.name, math.inf, wrong, leaves_device_unusable(error))


def findings(device: torch.device, workers: int | None = None) -> Iterator[Finding]:
    """One for each case, in order.

    Args:
        workers: processes that share the cases; half as many as there are processors on a CUDA device by default, at
            most `MOST_WORKERS`, and this one alone elsewhere.
    """
    if workers is None:
        workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2)) if device.type == "cuda" else 1
    shared = [(case.name, functools.partial(attempt, case, device)) for case in cases(device)]
    special = [
        (name, functools.partial(special_finding, number, device))
        for number, (name, _) in enumerate(special_cases(device))
    ]
    if workers == 1:
        yield from (work() for _, work in (*shared, *special))
        return
    free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(workers):
            free.put(stack.enter_context(_Process(device)))

        def run(named: tuple[str, Work]) -> Finding:
            process = free.get()
            try:
                return process.run(*named)
            finally:
                free.put(process)

        with ThreadPoolExecutor(workers) as threads:
            yield from threads.map(run, shared)
        # One after another, for some take much memory.
        yield from map(run, special)


class _Process:
    """A process that does work on a device, and another one after what it dies of, or what loses it the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def run(self, name: str, work: Work) -> Finding:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (self._device,))
        try:
            finding = self._pool.submit(work).result()
        except BrokenProcessPool:
            finding = Finding(name, math.inf, "its process was ended from outside, or by a fault", fatal=True)
        if finding.fatal:
            self.__exit__()
        return finding


def _begin(device: torch.device) -> None:
    """What a process of the pool does first."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
