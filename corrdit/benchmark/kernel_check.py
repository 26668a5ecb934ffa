"""Every kernel against the definition in float64: what a machine that has never run them is asked first.

It needs torch, triton and numpy alone. On a CUDA device all cases run, at sizes of several tiles; on a CPU, under
triton's interpreter, as many of them as show every mode and option of every operation once, at a few dozen tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.problem import float32_precision

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# ||error|| / ||exact|| that a result and a gradient may have. A softmax weight keeps eleven bits, and so does a result
# of float16; a gradient's factors and its result are rounded to the dtype of q. The worst element may be off by
# `WORST` times as much of the largest value.
TOLERANCE = {SINGLE: (2e-6, 1e-5), HALF: (2e-3, 4e-3), BRAIN: (6e-3, 1.2e-2)}
TF32_TOLERANCE = 4e-3
WORST = 6.0
# Share of best keys that rounding may turn the other way, where two are nearly as good, or one of few tokens; and how
# many tokens off a refined place still is the same.
MISMATCHES, PLACE = 0.01, 0.05
_GPU_GRID, _SMALL_GRID = TokenGrid(3, 22, 37, text_tokens=19), TokenGrid(2, 3, 7, text_tokens=5)
LAYOUTS = ("tokens first", "heads first", "dims first", "every other dim")
MODES = ("none", "logits", "features", "probabilities")


@dataclass(frozen=True)
class Case:
    """One call of an operation, and its gradients where it has any.

    Attributes:
        about: what is particular to it.
        options: arguments of the operation; tensors are made by `arguments`.
        masked: share of keys that a mask removes; 1 removes all.
        moved: whether the windows lie round random places.
        key_heads: of k and v; None for as many as q has.
    """

    operation: str
    about: str
    grid: TokenGrid
    dtype: torch.dtype = BRAIN
    head_dim: int = 64
    batch: int = 1
    heads: int = 3
    layout: str = "tokens first"
    masked: float = 0.0
    moved: bool = False
    key_heads: int | None = None
    precision: str = "ieee"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation}, {self.about}, {dtype}, head_dim {self.head_dim}, {self.layout}"

    def tensors(self, device: torch.device) -> list[Tensor]:
        """q, k and v (of the operation that takes it) in their dtype and layout, of the tokens that are asked for."""
        generator = torch.Generator().manual_seed(self.head_dim + self.heads)
        tensors = []
        for heads, part in ((self.heads, "queries"), *[(self.key_heads or self.heads, "keys")] * 2):
            drawn = 1.6 * torch.randn(self.batch, heads, self.grid.tokens, self.head_dim, generator=generator)
            if part in self.options:
                drawn = drawn[:, :, self.grid.video_slice][:, :, slice(*self.options[part])]
            tensors.append(laid_out(drawn.to(device=device, dtype=self.dtype), self.layout))
        return tensors if self.operation == "frame_local_attention" else tensors[:2]

    def arguments(self, device: torch.device) -> dict[str, Any]:
        """Of the operation, beside q, k, v and the grid."""
        generator = torch.Generator().manual_seed(1)
        arguments = dict(self.options)
        if self.masked:
            kept = torch.rand(self.batch, self.grid.tokens, generator=generator) >= self.masked
            arguments["key_mask"] = kept.to(device)
        if self.moved:
            frames, height, width = self.grid.frames, self.grid.height, self.grid.width
            place = torch.rand(self.batch, frames, frames, height, width, 2, generator=generator)
            arguments["center"] = (place * max(height, width)).to(device)
        return arguments

    def call(self, leaves: Sequence[Tensor], backend: str) -> list[Tensor]:
        """The results."""
        with float32_precision(self.precision):
            operation: Callable[..., Any] = getattr(ops, self.operation)
            found = operation(*leaves, self.grid, backend=backend, **self.arguments(leaves[0].device))
        return [found] if isinstance(found, Tensor) else list(found)

    def leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.detach().requires_grad_(self.differentiable) for tensor in inputs]

    def towards(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Incoming gradients, of very different size from row to row: each is to be as exact as if it were alone."""
        generator = torch.Generator().manual_seed(2)
        drawn = [
            torch.randn(result.shape, generator=generator)
            * torch.rand(result.shape[:-1], generator=generator)[..., None]
            for result in results
        ]
        # Rounded alike for every precision, so that float64 is asked the same question.
        return [
            one.to(device=result.device, dtype=self.dtype).to(result.dtype)
            for one, result in zip(drawn, results, strict=True)
        ]

    def run(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        """Results, then the gradients of all inputs."""
        leaves = self.leaves(inputs)
        results = self.call(leaves, backend)
        if not self.differentiable:
            return results
        gradients = torch.autograd.grad(results, leaves, self.towards(results))
        return [result.detach() for result in results] + list(gradients)

    @property
    def differentiable(self) -> bool:
        return self.operation in ("soft_displacement", "frame_local_attention")


class Finding(NamedTuple):
    """What a case came to: `error` is the largest share of what is allowed, `wrong` says what is wrong."""

    name: str
    error: float
    wrong: str | None


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values `[B, H, N, D]` with other strides."""
    if layout == "tokens first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dims first":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every other dim":
        wide = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 5, 2 * tensor.shape[3] + 1), math.nan)
        part = wide[:, :, 3 : 3 + tensor.shape[2], 1::2]
        return part.copy_(tensor)
    return tensor.contiguous()


def cases(device: torch.device) -> Iterator[Case]:
    """Every operation, mode and option, each with dtypes, head_dims and layouts in turn."""
    small = device.type != "cuda"
    grid = _SMALL_GRID if small else _GPU_GRID
    head_dims = (16, 10, 24) if small else (64, 128, 96, 10, 256)
    dtypes = itertools.cycle((BRAIN, SINGLE, HALF))
    turns = zip(itertools.cycle(head_dims), itertools.cycle(LAYOUTS), strict=False)
    chosen = [*_plain_cases(grid), *_part_cases(grid)]
    for case in covering(chosen) if small else chosen:
        # The options of a mode run in all dtypes, or one after the other where an interpreter is slow.
        for dtype in [next(dtypes)] if small else (BRAIN, HALF, SINGLE):
            head_dim, layout = next(turns)
            yield replace(case, dtype=dtype, head_dim=head_dim, layout=layout)
    if not small:
        yield from (
            Case("soft_displacement", f"heads={mode}, tf32", grid, SINGLE, precision="tf32", options={"heads": mode})
            for mode in ("none", "logits")
        )


def covering(cases: Iterable[Case]) -> Iterator[Case]:
    """Those of the cases that have something about them, of their operation, that none before them has."""
    seen: set[tuple[str, str]] = set()
    for case in cases:
        about = {(case.operation, word) for word in case.about.split(", ")}
        if not about <= seen:
            seen |= about
            yield case


def _part_cases(grid: TokenGrid) -> Iterator[Case]:
    """Ranges of queries and of keys with ends inside frames, one key head for all heads of q, and the log-sum-exp."""
    size = grid.tokens_per_frame
    queries, keys = (size // 2 + 1, size + size // 2), (5, (grid.frames - 1) * size + size // 3)
    both = {"queries": queries, "keys": keys}
    token = {"tokens": [size // 2 + 1, size - 1]}
    for mode in MODES:
        options = {**both, "heads": mode, **({} if mode == "probabilities" else {"return_lse": True})}
        case = Case("soft_displacement", f"heads={mode}, part", grid, key_heads=1, options=options)
        yield from (case, replace(case, about=f"{case.about}, part in a window", options={**options, "window": 2}))
        yield replace(case, about=f"{case.about}, part and mask", masked=0.3)
        of_mode = {"heads": mode}
        yield Case("hard_displacement", f"heads={mode}, part", grid, key_heads=1, options={**both, **of_mode})
        yield Case("match", f"heads={mode}, keys of a part", grid, key_heads=1, options={**of_mode, "keys": keys})
        forward = {**of_mode, **both, "bidirectional": False}
        yield Case("match", f"heads={mode}, part", grid, key_heads=1, options={**forward, "refine": 1})
        yield Case("cost_rows", f"heads={mode}, part", grid, key_heads=1, options={**forward, **token})
        yield Case("attention_mass", f"heads={mode}, part", grid, key_heads=1, options={**of_mode, **both, **token})
    for renormalize in (True, False):
        options = {**both, "renormalize": renormalize, "return_lse": True}
        yield Case("frame_local_attention", f"renormalize={renormalize}, part", grid, key_heads=1, options=options)


def _plain_cases(grid: TokenGrid) -> Iterator[Case]:
    text_last = replace(grid, text_first=False)
    for mode in MODES:
        for case in _variants(Case("soft_displacement", f"heads={mode}", grid, options={"heads": mode})):
            yield from (case, *_windows(case))
        for case in _variants(Case("hard_displacement", f"heads={mode}", grid, options={"heads": mode})):
            yield from (case, *_windows(case))
        for operation, more in _measures(grid).items():
            for about, options in more.items():
                yield from _variants(Case(operation, f"heads={mode}{about}", grid, options={"heads": mode, **options}))
    yield Case("soft_displacement", "a frame and its neighbours", grid, options={"frames": 1, "temperature": 2.0})
    yield Case("soft_displacement", "listed pairs", grid, options={"frames": [(1, 0), (1, 0), (0, 1)], "scale": 0.3})
    yield Case("soft_displacement", "frames of one row", TokenGrid(2, 1, 17), options={"heads": "none"})
    for renormalize, span in itertools.product((True, False), (0, 1)):
        options = {"renormalize": renormalize, "span": span}
        about = f"renormalize={renormalize}, span={span}"
        yield Case("frame_local_attention", about, grid, options=options)
        yield Case(
            "frame_local_attention", f"{about}, mask, text last", text_last, batch=2, masked=0.3, options=options
        )
    yield Case("frame_local_attention", "no key left", grid, masked=1.0)


def _variants(case: Case) -> Iterator[Case]:
    yield case
    yield replace(case, about=f"{case.about}, mask", masked=0.3, batch=2)
    if case.options["heads"] != "none":
        yield replace(case, about=f"{case.about}, weights", options={**case.options, "head_weights": [0.7, 0.0, 0.3]})


def _windows(case: Case) -> Iterator[Case]:
    if case.options["heads"] == "features" or "head_weights" in case.options:
        return
    for radius, moved in ((2, False), (1, True)):
        about = f"{case.about}, window {radius}" + (" round given places" if moved else "")
        yield replace(case, about=about, moved=moved, options={**case.options, "window": radius})


def _measures(grid: TokenGrid) -> dict[str, dict[str, dict[str, Any]]]:
    tokens = [0, grid.tokens_per_frame - 1, grid.width + 1]
    return {
        "match": {"": {}, ", refined": {"refine": 1}, ", forward": {"bidirectional": False, "source": 1}},
        "cost_rows": {"": {"tokens": tokens, "source": 1}, ", forward": {"tokens": tokens, "bidirectional": False}},
        "attention_mass": {"": {"tokens": tokens}},
    }


def compare(case: Case, device: torch.device, run: Callable[[list[Tensor]], list[Tensor]] | None = None) -> Finding:
    """The kernels (or `run`, another way to call them) against the reference in float64."""
    inputs = case.tensors(device)
    exact = case.run([tensor.double() for tensor in inputs], "reference")
    mine = case.run(inputs, "triton") if run is None else run(inputs)
    worst = 0.0
    count = len(exact) - (len(inputs) if case.differentiable else 0)
    for index, (one, truth) in enumerate(zip(mine, exact, strict=True)):
        what = f"result {index}" if index < count else f"gradient of {'qkv'[index - count]}"
        if one.shape != truth.shape:
            return Finding(case.name, math.inf, f"{what} has shape {list(one.shape)}, not {list(truth.shape)}")
        error = _of_allowed(one, truth, case, gradient=index >= count)
        worst = max(worst, error)
        if not error <= 1:
            return Finding(case.name, error, f"{what} is off by {error:.3g} times what is allowed")
    return Finding(case.name, worst, None)


def _of_allowed(result: Tensor, exact: Tensor, case: Case, *, gradient: bool) -> float:
    """The error as a share of what is allowed; NaN and infinity give infinity."""
    if not result.is_floating_point() or (case.operation == "match" and exact.shape[-1] == 2):
        off = (result.double() - exact.double()).abs().amax(-1) > PLACE
        return float(off.double().mean()) / max(MISMATCHES, 1.5 / off.numel())
    allowed = TF32_TOLERANCE if case.precision == "tf32" else TOLERANCE[case.dtype][gradient]
    defined = exact.isfinite()
    if not bool((result.isfinite() == defined).all()):
        return math.inf
    difference = (result.double() - exact)[defined]
    exact = exact[defined]
    norm, largest = float(exact.norm()), float(exact.abs().amax()) if exact.numel() else 0.0
    if norm == 0:
        # Nothing to compare with, such as the gradient of a softmax over one key: what cancels is of the size of 1.
        return float(difference.abs().sum()) / allowed
    return max(float(difference.norm()) / norm, float(difference.abs().amax()) / largest / WORST) / allowed


def special_findings(device: torch.device) -> Iterator[Finding]:
    """What only a CUDA device has: captured graphs, compiled callers, a second device."""
    if device.type != "cuda":
        return
    for operation, mode in (("soft_displacement", "none"), ("soft_displacement", "logits"), ("match", "probabilities")):
        case = Case(operation, f"heads={mode}, in a captured graph", _GPU_GRID, options={"heads": mode})
        yield compare(case, device, functools.partial(_captured, case))
        case = replace(case, about=f"heads={mode}, compiled with reduced overhead")
        yield compare(case, device, functools.partial(_compiled, case))
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        if other.index != torch.cuda.current_device():
            yield compare(Case("soft_displacement", f"on {other}, not current", _GPU_GRID), other)
            yield compare(Case("frame_local_attention", f"on {other}, not current", _GPU_GRID), other)


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


def findings(device: torch.device) -> Iterator[Finding]:
    """One for each case, in order; the first wrong one is the last that says anything of the kernels after it."""
    for case in cases(device):
        yield compare(case, device)
    yield from special_findings(device)
