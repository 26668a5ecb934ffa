"""Kernels on a GPU where there is one, else under Triton's interpreter, and how their results are compared.

A result may be off from the float64 reference by a small multiple of what plain PyTorch is off by in the same
precision, in its worst element and in the root mean square. Plain PyTorch is the reference run without its upcast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, reference
from corrdit.problem import PairProblem, TokenAxis, product_precision

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# Tests of what the interpreter alone lets see: tile products counted, lines of a kernel changed.
INTERPRETER_ALONE = ("test_planted_mistakes", "test_skipped_work", "test_float32_products", "test_far_offsets")
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
try:
    # Whether a kernel is interpreted is settled when its module is loaded.
    from corrdit import kernels
    from corrdit.kernels.inspection import ahead_of_time
    from corrdit.kernels.shared import configs, primitives
    from corrdit.kernels.shared.configs import Tiles

    for name in kernels.__all__:
        getattr(kernels, name)
finally:
    os.environ.pop("TRITON_INTERPRET", None)
assert primitives.INTERPRETED.value != ON_GPU, "a kernel module was loaded before tests/kernels/conftest.py"
assert ahead_of_time is not None

WORST, ROOT_MEAN_SQUARE = 4.0, 3.0
SMALL = Tiles(16, 16, 16, 1, 1)
LARGE = Tiles(64, 64, 32, 1, 1)
KERNELS = tuple(configs._LARGE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and item.path.stem in INTERPRETER_ALONE:
            item.add_marker(pytest.mark.skip(reason="looks into triton's interpreter, and here is a GPU"))


@pytest.fixture(autouse=True)
def where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`corrdit.ops` takes the kernels for CPU tensors where they are interpreted; else tensors are made on the GPU."""
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def undefined_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory nobody wrote holds NaN, or a token far outside."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        memory = empty(*arguments, **options)
        if memory.device.type == "meta":
            return memory
        return memory.fill_(float("nan") if memory.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **options: poisoned(t.shape, **{"dtype": t.dtype, "device": t.device, **options})
    )


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Tiles so small that a few dozen tokens are several tiles with a ragged last one."""
    with configs.override(**dict.fromkeys(KERNELS, SMALL)):
        yield


@pytest.fixture
def large_tiles() -> Iterator[None]:
    """Fewer programs for the interpreter, which takes milliseconds for each."""
    with configs.override(**dict.fromkeys(KERNELS, LARGE)):
        yield


class Case(NamedTuple):
    """One pinned input; `options` go to the operation as they are.

    `queries` and `keys` are the video tokens that q, and k with v, hold; `undefined_key` makes the first key NaN.
    """

    dtype: torch.dtype = torch.float32
    head_dim: int = 16
    grid: TokenGrid = TokenGrid(2, 3, 6)
    batch: int = 1
    heads: int = 2
    weights: tuple[float, ...] | None = None
    mode: str | None = "none"
    kept: float = 1.0
    layout: str = "heads first"
    size: float = 2.0
    options: dict[str, Any] | None = None
    window: int | None = None
    moved: bool = False
    key_heads: int | None = None
    queries: tuple[int, int] | None = None
    keys: tuple[int, int] | None = None
    with_lse: bool = False
    undefined_key: bool = False
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (1, 0))

    def held(self) -> dict[str, TokenAxis]:
        """Which tokens q and k hold, of those that do not hold all."""
        ranges = {"queries": self.queries, "keys": self.keys}
        return {name: TokenAxis.of_range(self.grid, *held, text=False) for name, held in ranges.items() if held}

    def tensor(self, seed: int) -> Tensor:
        """q (seed 0), k or v: `[B, H, N, D]`, in memory as the layout says."""
        heads = self.key_heads if seed and self.key_heads else self.heads
        drawn = self._drawn(seed, heads)
        held = self.keys if seed else self.queries
        if held is not None:
            drawn = drawn[:, :, self.grid.video_slice][:, :, slice(*held)]
        if seed == 1 and self.undefined_key:
            drawn = drawn.clone()
            drawn[:, :, 0] = float("nan")
        return drawn

    def _drawn(self, seed: int, heads: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        tokens = self.grid.tokens
        if self.layout == "tokens first":
            drawn = torch.randn(self.batch, tokens, heads, self.head_dim, generator=generator).transpose(1, 2)
        elif self.layout == "slices":
            wide = torch.randn(self.batch, heads, tokens + 9, 2 * self.head_dim + 1, generator=generator)
            drawn = wide[:, :, 5 : 5 + tokens, 1::2]
        elif self.layout == "dims first":
            drawn = torch.randn(self.batch, heads, self.head_dim, tokens, generator=generator).transpose(2, 3)
        else:
            drawn = torch.randn(self.batch, heads, tokens, self.head_dim, generator=generator)
        return (drawn * self.size).to(self.dtype)

    def key_mask(self) -> Tensor | None:
        if self.kept == 1.0:
            return None
        generator = torch.Generator(DEVICE).manual_seed(7)
        # A slice of something longer, as the operations pass it.
        kept = (torch.rand(self.batch, self.grid.tokens + 3, generator=generator) < self.kept)[:, 3:]
        return kept if self.keys is None else kept[:, self.grid.video_slice][:, slice(*self.keys)]

    def head_weights(self) -> Tensor | None:
        if self.mode in (None, "none"):
            return None
        weights = torch.tensor(self.weights or (1.0,) * self.heads)
        return weights / weights.sum()

    def centers(self) -> Tensor | None:
        if not self.moved:
            return None
        shape = (self.batch, len(self.pairs), self.grid.height, self.grid.width, 2)
        return torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(8)) * 9 - 1.5


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = (result.detach().double() - exact.detach()).flatten()
    return float(difference.abs().max()), float(difference.square().mean().sqrt())


def assert_as_exact_as_plain(what: str, result: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The tolerance; a plain result that happens to be exact still grants a few roundings of the largest value."""
    assert result.shape == exact.shape, what
    undefined = ~exact.isfinite()
    assert torch.equal(result.isnan(), exact.isnan()), f"{what} holds NaN elsewhere than float64 has it"
    assert torch.equal(result[undefined].nan_to_num(7.0), exact[undefined].to(result.dtype).nan_to_num(7.0)), what
    result, exact, plain = (tensor.masked_fill(undefined, 0.0) for tensor in (result, exact, plain))
    rounding = 4 * torch.finfo(result.dtype).eps * (float(exact.detach().abs().max()) or 1.0)
    for kind, factor, mine, theirs in zip(
        ("worst element", "root mean square"),
        (WORST, ROOT_MEAN_SQUARE),
        errors(result, exact),
        errors(plain, exact),
        strict=True,
    ):
        allowed = factor * max(theirs, rounding)
        assert mine <= allowed, f"{what}: {kind} is off by {mine:.3g}, plain PyTorch by {theirs:.3g}"


def whole_problem(
    grid: TokenGrid,
    pairs: list[tuple[int, int]],
    *,
    scale: float,
    heads: str = "none",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    key_mask: Tensor | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    queries: TokenAxis | None = None,
    keys: TokenAxis | None = None,
    with_lse: bool = False,
) -> PairProblem:
    """A problem about every token unless an axis is given; `center` is `[B, P, h, w, 2]`."""
    whole = TokenAxis.of_grid(grid)
    return PairProblem(
        grid, queries or whole, keys or whole, scale * temperature, heads=heads, weights=weights, pairs=pairs,
        key_mask=key_mask, with_lse=with_lse, window=window, center=None if center is None else center.flatten(1, 3),
        precision=product_precision(),
    )  # fmt: skip


def call_backend(backend: Any, operation: str, *arguments: Any, **options: Any) -> Any:
    """`operation(q, k, (v,) grid, ...)` of a backend, as `corrdit.ops` lays its result out."""
    inputs = [argument for argument in arguments[:3] if isinstance(argument, Tensor)]
    grid, *rest = arguments[len(inputs) :]
    own = {name: options.pop(name) for name in ("bidirectional", "refine", "renormalize", "span") if name in options}
    heads, source = options.get("heads", "none"), options.pop("source", 0)
    if operation == "match":
        source, targets = rest
        pairs, rest = [(source, target) for target in targets], []
    elif operation == "cost_rows":
        pairs = [(source, frame) for frame in range(grid.frames)]
    elif operation.endswith("displacement"):
        pairs, rest = list(rest[0]), []
    else:
        pairs = []
    if operation == "attention_mass":
        own["source"] = source
    found = getattr(backend, operation)(*inputs, whole_problem(grid, pairs, **options), *rest, **own)
    if operation == "frame_local_attention":
        return found if options.get("with_lse") else found[0]
    parts = [found] if isinstance(found, Tensor) else [part for part in found if part is not None]
    if heads != "none":
        parts = [part.squeeze(1) for part in parts]
    if "queries" in options:
        return tuple(parts)
    if operation.endswith("displacement"):
        return parts[0].unflatten(-2, (-1, grid.height, grid.width))
    if operation == "match":
        return tuple(part.unflatten(2 if heads == "none" else 1, (-1, grid.height, grid.width)) for part in parts)
    if operation == "cost_rows":
        return parts[0].unflatten(-1, (grid.height, grid.width))
    return tuple(parts)


def results(module: Any, operation: str, case: Case, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """What the operation gives on one backend, computed from inputs of `dtype`; then its gradients."""
    count = 3 if operation == "frame_local_attention" else 2
    inputs = [case.tensor(seed).to(dtype).requires_grad_(gradients) for seed in range(count)]
    options: dict[str, Any] = {"scale": 0.8 * case.head_dim**-0.5, "key_mask": case.key_mask(), **(case.options or {})}
    options.update(case.held())
    if case.with_lse:
        options["with_lse"] = True
    if case.mode is not None:
        weights = case.head_weights()
        # The kernels read float32 weights, whatever the dtype.
        kept = torch.float32 if module is kernels else dtype
        options.update(heads=case.mode, weights=None if weights is None else weights.to(kept))
    arguments: list[Any] = [*inputs, case.grid]
    if operation.endswith("displacement"):
        arguments.append(list(case.pairs))
        options.update(temperature=1.3, window=case.window, center=case.centers())
    arguments += options.pop("positional", [])
    found = call_backend(module, operation, *arguments, **options)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if not gradients:
        return outputs
    generator = torch.Generator(DEVICE).manual_seed(9)
    towards = []
    for output in outputs:
        drawn = torch.randn(output.shape, generator=generator)
        # Rows of very different gradients: each is to be as exact as if it were alone. None of an undefined one.
        drawn = drawn * torch.rand(output.shape[:-1], generator=generator).pow(4)[..., None]
        towards.append(drawn.to(output.dtype).masked_fill(~output.detach().isfinite(), 0.0))
    return outputs + list(torch.autograd.grad(outputs, inputs, towards))


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`check(operation, case, gradients)`: the kernels against the reference and plain PyTorch."""

    def compare(operation: str, case: Case, gradients: bool = False) -> None:
        mine = results(kernels, operation, case, case.dtype, gradients)
        exact = results(reference, operation, case, torch.float64, gradients)
        with monkeypatch.context() as patch:
            patch.setattr(reference.scores, "working_dtype", lambda dtype: dtype)
            plain = results(reference, operation, case, case.dtype, gradients)
        for index, (one, two, three) in enumerate(zip(mine, exact, plain, strict=True)):
            if one.dtype == torch.int64:
                assert torch.equal(one, two), f"{operation}: {int((one != two).sum())} of {one.numel()} differ"
            else:
                assert_as_exact_as_plain(f"{operation}, tensor {index}", one, two, three)

    return compare


@pytest.fixture(scope="session")
def case() -> type[Case]:
    return Case


@pytest.fixture(scope="session")
def call() -> Callable[..., Any]:
    return call_backend


@pytest.fixture(scope="session")
def problem_about() -> Callable[..., PairProblem]:
    return whole_problem
