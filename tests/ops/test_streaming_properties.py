"""The streaming backend against the reference in float64, over shapes, masks, windows and memory layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from corrdit import TokenGrid, motion, ops
from corrdit.motion.flow_loss import FLOW_LOSSES

HEAD_MODES = ("logits", "features", "probabilities", "none")
BACKENDS = ("reference", "streaming")
LAYOUTS = ("contiguous", "tokens before heads", "every other channel", "shared by heads")
# Where budgets matter they are small enough to force chunks of a few rows, and large enough for the largest draw.
BUDGETS = (None, 150_000)

thorough = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[TokenGrid, dict[str, object], list[Tensor]]:
    """A grid, the options common to all operations, and q, k, v in some layout."""
    grid = TokenGrid(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 7)),
        text_tokens=draw(st.integers(0, 5)),
        text_first=draw(st.booleans()),
    )
    batch, heads, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layout = draw(st.sampled_from(LAYOUTS))
    tensors = [laid_out(layout, (batch, heads, grid.tokens, head_dim), generator) for _ in range(3)]
    mode = draw(st.sampled_from(HEAD_MODES))
    options: dict[str, object] = {"heads": mode, "memory_budget": draw(st.sampled_from(BUDGETS))}
    if mode != "none" and draw(st.booleans()):
        options["head_weights"] = [float(weight) for weight in range(1, heads + 1)]
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, grid.tokens, generator=generator) > draw(st.sampled_from((0.3, 0.9)))
    if draw(st.booleans()):
        options["scale"] = 0.7
    return grid, options, tensors


def laid_out(layout: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    batch, heads, tokens, width = shape
    if layout == "tokens before heads":
        stored = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2)
    elif layout == "every other channel":
        stored = torch.randn(batch, heads, tokens, 2 * width, generator=generator, dtype=torch.float64)[..., ::2]
    elif layout == "shared by heads":
        stored = torch.randn(batch, 1, tokens, width, generator=generator, dtype=torch.float64).expand(shape)
    else:
        stored = torch.randn(shape, generator=generator, dtype=torch.float64)
    return stored.requires_grad_()


def of(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options for a backend: a budget is for the streaming one alone."""
    return {**options, "backend": backend, **({"memory_budget": None} if backend == "reference" else {})}


def frame_choices(grid: TokenGrid) -> st.SearchStrategy[object]:
    frame = st.integers(0, grid.frames - 1)
    return st.none() | st.integers(0, grid.frames) | st.lists(st.tuples(frame, frame), min_size=1, max_size=6)


def displacement_options(data: st.DataObject, grid: TokenGrid, batch: int) -> dict[str, object]:
    frames = data.draw(frame_choices(grid))
    options: dict[str, object] = {"frames": frames, "temperature": data.draw(st.sampled_from((1.0, 2.5)))}
    window = data.draw(st.none() | st.integers(0, 4))
    if window is not None:
        options["window"] = window
        if data.draw(st.booleans()):
            pairs = grid.frame_pairs(frames)
            axes = (grid.frames, grid.frames) if frames is None else (len(pairs),)
            generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
            spread = torch.rand(batch, *axes, grid.height, grid.width, 2, generator=generator, dtype=torch.float64)
            # Half tokens and places outside the frame are in the range.
            options["center"] = (spread * 20).round() / 2 - 2
    return options


def assert_same(results: list[tuple[Tensor, ...]], tolerance: float = 1e-10) -> None:
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@thorough
@given(scenes(), st.data())
def test_soft_displacement_and_gradients(scene, data):
    grid, options, (q, k, _) = scene
    options |= displacement_options(data, grid, q.shape[0])
    results = []
    for backend in BACKENDS:
        moved = ops.soft_displacement(q, k, grid, **of(backend, options))
        generator = torch.Generator().manual_seed(7)
        incoming = torch.randn(moved.shape, generator=generator, dtype=torch.float64)
        results.append((moved, *torch.autograd.grad(moved, (q, k), incoming)))
    assert_same(results)


@thorough
@given(scenes(), st.data(), st.sampled_from(FLOW_LOSSES))
def test_attention_flow_loss_and_gradients(scene, data, variant):
    """Against the loss of the reference's displacements; the incoming gradient scales what the forward pass found."""
    grid, options, (q, k, _) = scene
    options |= displacement_options(data, grid, q.shape[0])
    flow = ops.soft_displacement(q, k, grid, **of("reference", options))
    generator = torch.Generator().manual_seed(7)
    reference = torch.randint(-1, 2, flow.shape, generator=generator)
    reference[..., 0, 0, :] = 1
    if data.draw(st.booleans()):
        reference = reference * 0.75
    composed = motion.flow_loss(flow, reference, variant=variant)
    loss = motion.attention_flow_loss(q, k, grid, reference, variant=variant, backend="streaming", **options)
    assert_same([(total, *torch.autograd.grad(1.5 * total, (q, k))) for total in (composed, loss)])


@thorough
@given(scenes(), st.data())
def test_hard_displacement(scene, data):
    grid, options, (q, k, _) = scene
    options |= displacement_options(data, grid, q.shape[0])
    assert_same([(ops.hard_displacement(q, k, grid, **of(b, options)),) for b in BACKENDS])


@pytest.mark.parametrize(
    "pairs", [[(0, 0), (1, 7), (0, 1)], [(0, 0), (1, 1), (1, 2)], [(0, 1), (0, 0), (0, 1), (0, 2)]], ids=str
)
def test_pairs_in_any_order_keep_their_places(pairs):
    """Six of these frames share a matrix product: key frames that follow each other, but not in the list of pairs."""
    grid = TokenGrid(8, 16, 16)
    generator = torch.Generator().manual_seed(12)
    q, k = (torch.randn(1, 1, grid.tokens, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    assert_same([(ops.soft_displacement(q, k, grid, frames=pairs, temperature=9.0, backend=b),) for b in BACKENDS])


@pytest.mark.parametrize("heads", HEAD_MODES)
@pytest.mark.parametrize("window", [None, 2])
def test_ties_go_to_the_lowest_index(heads, window):
    """Small whole numbers and two heads: sums are exact, so equal scores are equal in every backend."""
    grid = TokenGrid(2, 5, 6)
    generator = torch.Generator().manual_seed(11)
    q, k = (torch.randint(-1, 2, (2, 2, grid.tokens, 4), generator=generator).double() for _ in range(2))
    assert_same([(ops.hard_displacement(q, k, grid, heads=heads, window=window, backend=b),) for b in BACKENDS])
    everything_equal = ops.hard_displacement(torch.zeros_like(q), k, grid, heads=heads, backend="streaming")
    first = -grid.coordinates(dtype=torch.float64).long().view(5, 6, 2)
    assert torch.equal(everything_equal, first.expand_as(everything_equal))


@thorough
@given(scenes(), st.data())
def test_match_and_cost_rows(scene, data):
    grid, options, (q, k, _) = scene
    source = data.draw(st.integers(0, grid.frames - 1))
    options |= {"source": source, "bidirectional": data.draw(st.booleans())}
    tokens = data.draw(st.lists(st.integers(0, grid.tokens_per_frame - 1), min_size=1, max_size=5))
    targets = data.draw(st.lists(st.integers(0, grid.frames - 1), min_size=1, max_size=3))
    refine = data.draw(st.integers(0, 3))
    results = []
    for backend in BACKENDS:
        found = ops.match(q, k, grid, targets=targets, refine=refine, **of(backend, options))
        results.append((*found, ops.cost_rows(q, k, grid, tokens, **of(backend, options))))
    assert_same(results)


@thorough
@given(scenes(), st.data())
def test_attention_mass(scene, data):
    grid, options, (q, k, _) = scene
    tokens = data.draw(st.lists(st.integers(0, grid.tokens_per_frame - 1), min_size=1, max_size=5))
    source = data.draw(st.integers(0, grid.frames - 1))
    both = [tuple(ops.attention_mass(q, k, grid, tokens, source=source, **of(b, options))) for b in BACKENDS]
    assert_same(both)


@thorough
@given(scenes(), st.booleans(), st.integers(0, 4))
def test_frame_local_attention_and_gradients(scene, renormalize, span):
    grid, options, (q, k, v) = scene
    kept = {name: options[name] for name in ("key_mask", "scale", "memory_budget") if name in options}
    results = []
    for backend in BACKENDS:
        attended = ops.frame_local_attention(q, k, v, grid, renormalize=renormalize, span=span, **of(backend, kept))
        generator = torch.Generator().manual_seed(7)
        incoming = torch.randn(attended.shape, generator=generator, dtype=torch.float64)
        results.append((attended, *torch.autograd.grad(attended, (q, k, v), incoming)))
    assert_same(results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", HEAD_MODES)
@pytest.mark.parametrize("budget", [None, 200_000])
def test_error_of_each_precision_is_that_of_its_rounding(dtype, heads, budget):
    """Scores, statistics and sums are float32, so only the inputs and the gradients carry the input's rounding."""
    grid = TokenGrid(3, 7, 9, text_tokens=2)
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 3, grid.tokens, 16, generator=generator).to(dtype) for _ in range(2))
    incoming = torch.randn(ops.soft_displacement(q, k, grid, heads=heads).shape, generator=generator)
    results = []
    for inputs, backend in (((q.double(), k.double()), "reference"), ((q, k), "streaming")):
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        moved = ops.soft_displacement(
            *inputs, grid, heads=heads, temperature=2.0, **of(backend, {"memory_budget": budget})
        )
        results.append((moved, *torch.autograd.grad(moved, inputs, incoming.to(moved.dtype))))
    assert results[1][0].dtype == torch.float32
    assert results[1][1].dtype == dtype
    steps = (2e-6, *[torch.finfo(dtype).eps + 2e-6] * 2)
    for exact, rounded, step in zip(*results, steps, strict=True):
        assert (exact - rounded.double()).abs().max() <= step * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frame_local_attention_in_each_precision(dtype):
    grid = TokenGrid(3, 4, 5, text_tokens=4)
    generator = torch.Generator().manual_seed(4)
    q, k, v, incoming = (torch.randn(1, 2, grid.tokens, 16, generator=generator).to(dtype) for _ in range(4))
    results = []
    for kind, backend in ((torch.float64, "reference"), (dtype, "streaming")):
        inputs = [tensor.to(kind, copy=True).requires_grad_() for tensor in (q, k, v)]
        attended = ops.frame_local_attention(*inputs, grid, backend=backend)
        results.append((attended, *torch.autograd.grad(attended, inputs, incoming.to(kind))))
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == dtype
        assert (exact - rounded.double()).abs().max() <= (torch.finfo(dtype).eps + 2e-6) * exact.abs().max()
