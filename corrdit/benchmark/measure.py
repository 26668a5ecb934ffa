"""Times, peak memory, and the limits of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], Sequence[Tensor]]
# Larger than any cache, so that a timed call does not find its input where the last one left it.
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Times:
    """Times of one call in milliseconds."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        return cls(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds), len(seconds))


def time_interleaved(works: dict[str, Work], device: torch.device, rounds: int) -> dict[str, Times]:
    """Times several works in turns, one call each a round, so that what else the machine does hits all of them.

    One call of each goes before and is not counted: it compiles, allocates and fills caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(_seconds_on_gpu(work, device) if device.type == "cuda" else _seconds(work))
    return {name: Times.of(values) for name, values in seconds.items()}


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_on_gpu(work: Work, device: torch.device) -> float:
    torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device).zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def peak_extra_bytes(work: Work, device: torch.device) -> int:
    """Peak of the bytes allocated during a call, beyond what was there before and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        results, peak = _peak_on_cpu(work)
    storages = {result.untyped_storage().data_ptr(): result.untyped_storage().nbytes() for result in results}
    return peak - sum(storages.values())


def _peak_on_cpu(work: Work) -> tuple[Sequence[Tensor], int]:
    """By the allocator's own record, which also has what library calls allocate inside."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        results = work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return results, peak


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches in the two things everything is made of."""

    matmul_tflops: float
    copy_gigabytes: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several square matrix products, and of several copies (bytes read plus bytes written)."""
    size, elements = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    times = time_interleaved(
        {"matmul": lambda: (torch.mm(left, right),), "copy": lambda: (target.copy_(source),)}, device, rounds=10
    )
    return Ceilings(2 * size**3 / times["matmul"].least / 1e9, 2 * elements / times["copy"].least / 1e6)
