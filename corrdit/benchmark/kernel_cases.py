"""The calls that `corrdit.benchmark.kernel_check` compares with float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.problem import float32_precision

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
GPU_GRID, SMALL_GRID = TokenGrid(3, 22, 37, text_tokens=19), TokenGrid(2, 5, 6, text_tokens=5)
LAYOUTS = ("tokens first", "heads first", "dims first", "every other dim")
FAR = "far apart"
"""A layout with heads further apart than 32 bits count; in 16 bits it takes 4 GiB for each two heads."""
MODES = ("none", "logits", "features", "probabilities")
OPERATIONS = (
    "soft_displacement", "hard_displacement", "match", "cost_rows", "attention_mass", "frame_local_attention",
)  # fmt: skip
DIFFERENTIABLE = ("soft_displacement", "frame_local_attention")
DISPLACEMENTS = ("soft_displacement", "hard_displacement")


@dataclass(frozen=True)
class Case:
    """One call of an operation, and its gradients where it has any.

    Attributes:
        about: what is particular to it.
        options: arguments of the operation; tensors are made by `arguments`.
        masked: share of keys that a mask removes; 1 removes all.
        moved: whether the windows lie round random places.
        key_heads: of k and v; None for as many as q has.
        with_text: whether a part of the tokens comes with the text.
        undefined: whether removed keys, and queries of heads of weight 0, hold NaN.
        asked: the inputs whose gradients are asked for.
        shards: limits of ranges of keys, whose results are merged; none for one call.
        size: standard deviation of the inputs, drawn by `seed`.
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
    with_text: bool = False
    undefined: bool = False
    asked: str = "qkv"
    shards: tuple[int, ...] = ()
    precision: str = "ieee"
    size: float = 1.6
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation}, {self.about}, {dtype}, head_dim {self.head_dim}, {self.layout}"

    @property
    def differentiable(self) -> bool:
        return self.operation in DIFFERENTIABLE

    def tensors(self, device: torch.device) -> list[Tensor]:
        """q, k and v (of the operation that takes it) in their dtype and layout, of the tokens that are asked for."""
        generator = torch.Generator().manual_seed(self.seed + self.head_dim + self.heads)
        weights, kept = self.options.get("head_weights"), self._kept()
        tensors = []
        for name in "qkv" if self.operation == "frame_local_attention" else "qk":
            heads = self.heads if name == "q" else self.key_heads or self.heads
            drawn = self.size * torch.randn(self.batch, heads, self.grid.tokens, self.head_dim, generator=generator)
            if self.undefined and name == "q" and weights is not None:
                drawn[:, [head for head, weight in enumerate(weights) if weight == 0]] = math.nan
            if self.undefined and name != "q" and kept is not None:
                drawn.masked_fill_(~kept[:, None, :, None], math.nan)
            drawn = self._held(drawn, name)
            tensors.append(laid_out(drawn.to(device=device, dtype=self.dtype), self.layout))
        return tensors

    def _held(self, tensor: Tensor, name: str) -> Tensor:
        """What q, k or v holds of `[B, H, N, D]` of all tokens."""
        part = self.options.get("queries" if name == "q" else "keys")
        frames = self.options.get("query_frames") if name == "q" else None
        if part is not None:
            return range_of(tensor, self.grid, part, text=self.with_text)
        if frames is None:
            return tensor
        chosen = [tensor[:, :, self.grid.frame_slice(frame)] for frame in frames]
        if self.with_text:
            chosen.insert(0 if self.grid.text_first else len(chosen), tensor[:, :, self.grid.text_slice])
        return torch.cat(chosen, 2)

    def _kept(self) -> Tensor | None:
        """bool `[B, N]` of the whole axis, True = may be attended."""
        if not self.masked:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.grid.tokens, generator=generator) >= self.masked

    def arguments(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        """Of the operation, beside its tensors and the grid."""
        arguments = dict(self.options)
        kept = self._kept()
        if kept is not None:
            arguments["key_mask"] = kept.to(q.device)
        if self.moved:
            plain = {name: value for name, value in arguments.items() if name != "return_lse"}
            shape = list(ops.hard_displacement(q, k, self.grid, backend="reference", **plain).shape)
            if self.options.get("heads") == "none":
                del shape[1]
            drawn = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed + 1))
            place = drawn * (max(self.grid.height, self.grid.width) + 2) - 1
            arguments["center"] = place.to(q.device)
        return arguments

    def call(self, leaves: Sequence[Tensor], backend: str) -> list[Tensor]:
        """The results; shards of keys are one call for the reference."""
        operation: Callable[..., Any] = getattr(ops, self.operation)
        arguments = self.arguments(leaves[0].detach(), leaves[1].detach())
        with float32_precision(self.precision):
            if self.shards and backend != "reference":
                q, *rest = leaves
                of_shards = []
                for shard in itertools.pairwise(self.shards):
                    # The text takes part in one of them.
                    text = self.operation == "frame_local_attention" and shard[0] == 0
                    held = [range_of(tensor, self.grid, shard, text=text) for tensor in rest]
                    of_shards.append(operation(q, *held, self.grid, backend=backend, keys=shard, **arguments))
                results, lses = zip(*of_shards, strict=True)
                return [ops.merge(results, lses), torch.stack(lses).logsumexp(0)]
            found = operation(*leaves, self.grid, backend=backend, **arguments)
        return [found] if isinstance(found, Tensor) else list(found)

    def leaves(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        wanted = self.asked if self.differentiable else ""
        return [tensor.detach().requires_grad_(name in wanted) for name, tensor in zip("qkv", inputs, strict=False)]

    def towards(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Incoming gradients, of very different size from row to row: each is to be as exact as if it were alone."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        drawn = [
            torch.randn(result.shape, generator=generator)
            * torch.rand(result.shape[:-1], generator=generator)[..., None]
            for result in results
        ]
        # Rounded alike for every precision, so that float64 is asked the same question; none of an undefined result.
        return [
            one.to(device=result.device, dtype=self.dtype)
            .to(result.dtype)
            .masked_fill(~result.detach().isfinite(), 0.0)
            for one, result in zip(drawn, results, strict=True)
        ]

    def run(self, inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
        """Results, then the gradients of the inputs that are asked for."""
        leaves = self.leaves(inputs)
        results = self.call(leaves, backend)
        if not self.differentiable:
            return results
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        pairs = zip(results, self.towards(results), strict=True)
        # The log-sum-exp of frame-local attention does not depend on v.
        outputs, incoming = zip(*[pair for pair in pairs if pair[0].requires_grad], strict=True)
        gradients = torch.autograd.grad(outputs, wanted, incoming)
        return [result.detach() for result in results] + list(gradients)


def range_of(tensor: Tensor, grid: TokenGrid, part: tuple[int, int], *, text: bool) -> Tensor:
    """Video tokens `part` of `[B, H, N, D]`, with the text at its end of them if it is asked for."""
    video = tensor[:, :, grid.video_slice][:, :, slice(*part)]
    if not text:
        return video
    of_text = tensor[:, :, grid.text_slice]
    return torch.cat((of_text, video) if grid.text_first else (video, of_text), 2)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values `[B, H, N, D]` with other strides."""
    if layout == "tokens first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dims first":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == FAR:
        batch, heads, tokens, dims = tensor.shape
        reach = 2**31 + tokens * dims
        wide = tensor.new_empty(((batch * heads - 1) * reach + tokens * dims,))
        return wide.as_strided(tensor.shape, (heads * reach, reach, dims, 1)).copy_(tensor)
    if layout == "every other dim":
        wide = tensor.new_full((*tensor.shape[:2], tensor.shape[2] + 5, 2 * tensor.shape[3] + 1), math.nan)
        part = wide[:, :, 3 : 3 + tensor.shape[2], 1::2]
        return part.copy_(tensor)
    return tensor.contiguous()


def cases(device: torch.device) -> Iterator[Case]:
    """Every operation, mode and option, each with dtypes, head_dims and layouts in turn."""
    small = device.type != "cuda"
    grid = SMALL_GRID if small else GPU_GRID
    head_dims = (16, 10, 24) if small else (64, 128, 96, 10, 256)
    dtypes = itertools.cycle((BRAIN, SINGLE, HALF))
    turns = zip(itertools.cycle(head_dims), itertools.cycle(LAYOUTS), strict=False)
    chosen = [*_plain_cases(grid), *_part_cases(grid), *_more_cases(grid)]
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


def _more_cases(grid: TokenGrid) -> Iterator[Case]:
    """Chosen frames, head subsets of shared key heads, NaN where nothing is read, one gradient alone, merged shards."""
    size = grid.tokens_per_frame
    last = grid.frames - 1
    token = {"tokens": [1, size - 1]}
    own: dict[str, dict[str, Any]] = {
        "match": {"source": last, "targets": [0]},
        "cost_rows": {**token, "bidirectional": False},
        "attention_mass": token,
    }
    groups = {"head_weights": [0.5, 0.0, 0.3, 0.2], "heads": "logits"}
    for operation in OPERATIONS:
        options = own.get(operation, {})
        local = operation == "frame_local_attention"
        text = local or operation == "attention_mass"
        chosen = {**options, "query_frames": [last, 0]}
        yield Case(operation, "chosen frames", grid, with_text=text, options=chosen)
        heads = {} if local else groups
        about = "key heads for two heads each, NaN where nothing is read"
        yield Case(operation, about, grid, heads=4, key_heads=2, masked=0.3, undefined=True,
                   options={**options, **heads})  # fmt: skip
    limits = (0, size // 3, size + 2, grid.video_tokens)
    for mode in ("none", "logits", "features"):
        merged = {"heads": mode, "return_lse": True}
        yield Case("soft_displacement", f"heads={mode}, merged", grid, shards=limits, options=merged)
        for name in "qk":
            yield Case("soft_displacement", f"heads={mode}, gradient of {name} alone", grid, asked=name,
                       options={"heads": mode})  # fmt: skip
    for renormalize in (True, False):
        options = {"renormalize": renormalize}
        about = f"renormalize={renormalize}"
        yield Case("frame_local_attention", f"{about}, merged", grid, shards=limits,
                   options={**options, "return_lse": True})  # fmt: skip
        for name in "qkv":
            yield Case("frame_local_attention", f"{about}, gradient of {name} alone", grid, asked=name, options=options)
    for operation, mode in itertools.product(DISPLACEMENTS, MODES):
        yield Case(operation, f"heads={mode}, temperature", grid, options={"heads": mode, "temperature": 1.7})


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
    for mode in ("probabilities", "none", "logits"):
        yield Case("hard_displacement", f"no key left, heads={mode}", grid, masked=1.0, options={"heads": mode})


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
