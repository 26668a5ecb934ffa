"""Times, peak memory, and the limits of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from corrdit.benchmark.floors import Ceilings

Call = Callable[[], Sequence[Tensor]]
# Larger than any cache, so that a timed call does not find its input where the last one left it.
_CACHE_BYTES = 2**28
_CEILING_ROUNDS = 10


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


def time_interleaved(
    works: Mapping[str, Call], device: torch.device, rounds: Mapping[str, int]
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Times several works in turns, one call each a round, so that what else the machine does hits all of them.

    Args:
        works: each was called before, so that it is compiled and has filled the allocator's caches.
        rounds: timed calls of each.

    Returns:
        the times, and what those died of that failed on the way.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    failures: dict[str, Exception] = {}
    for number in range(max(rounds.values(), default=0)):
        for name, work in works.items():
            if number >= rounds[name] or name in failures:
                continue
            try:
                seconds[name].append(_seconds_of(work, device))
            except Exception as error:  # whatever one dies of, the others go on
                failures[name] = error
    return {name: Times.of(values) for name, values in seconds.items() if values and name not in failures}, failures


def _seconds_of(work: Call, device: torch.device) -> float:
    """Seconds of one call: between events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device).zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


def replay(work: Call, device: torch.device) -> Call | None:
    """A call that was made before, as a captured CUDA graph: its time without what Python and launches take.

    None on a device without graphs.
    """
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replayed() -> Sequence[Tensor]:
        graph.replay()
        return results

    return replayed


def peak_extra_bytes(work: Call, device: torch.device) -> int:
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
    return max(0, peak - sum(storages.values()))


def _peak_on_cpu(work: Call) -> tuple[Sequence[Tensor], int]:
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


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of several square matrix products, of several copies and of several runs of exponentials."""
    size, elements = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    count, exponentials = _exponentials(device)
    works: dict[str, Call] = {
        "matmul": lambda: (torch.mm(left, right),),
        "copy": lambda: (target.copy_(source),),
        "exponentials": exponentials,
    }
    for work in works.values():
        work()
    times, failures = time_interleaved(works, device, dict.fromkeys(works, _CEILING_ROUNDS))
    for error in failures.values():
        raise error
    return Ceilings(
        2 * size**3 / times["matmul"].least / 1e9,
        2 * elements / times["copy"].least / 1e6,
        count / times["exponentials"].least / 1e6,
    )


def _exponentials(device: torch.device) -> tuple[int, Call]:
    """How many powers of two a work computes, and the work; its numbers never leave registers or the cache."""
    if device.type == "cuda":
        from corrdit.benchmark import exponentials

        programs, rounds = 16 * torch.cuda.get_device_properties(device).multi_processor_count, 4096
        return programs * exponentials.BLOCK * rounds, lambda: (exponentials.exponentials(device, programs, rounds),)
    numbers, rounds = torch.linspace(-8, 0, 2**16 * torch.get_num_threads()), 50
    powers = torch.empty_like(numbers)

    def work() -> Sequence[Tensor]:
        for _ in range(rounds):
            torch.exp2(numbers, out=powers)
        return (powers,)

    return rounds * numbers.numel(), work
