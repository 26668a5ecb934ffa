"""Memory beyond inputs and outputs, counted by the allocator: under the budget however long the video."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from corrdit import TokenGrid, motion, ops

BUDGET = 320_000


def extra_bytes(work: Callable[[], tuple[Tensor, ...]]) -> int:
    """Peak of the bytes allocated while `work` runs, less those of the tensors it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - sum(result.untyped_storage().nbytes() for result in results)


def scene(frames: int, dtype: torch.dtype, text_tokens: int = 5) -> tuple[TokenGrid, list[Tensor]]:
    grid = TokenGrid(frames, 6, 8, text_tokens=text_tokens)
    generator = torch.Generator().manual_seed(1)
    return grid, [torch.randn(1, 4, grid.tokens, 16, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])
@pytest.mark.parametrize("window", [None, 2])
def test_soft_displacement_and_its_gradients(dtype, heads, window):
    extra = {}
    for frames in (3, 16):
        grid, (q, k, _) = scene(frames, dtype)
        q, k = q.requires_grad_(), k.requires_grad_()
        span = {"frames": 2} if frames > 3 and window else {}
        options = {"heads": heads, "window": window, "backend": "streaming", "memory_budget": BUDGET, **span}
        incoming = torch.ones_like(ops.soft_displacement(q, k, grid, **options))

        def work(q=q, k=k, grid=grid, options=options, incoming=incoming) -> tuple[Tensor, ...]:
            moved = ops.soft_displacement(q, k, grid, **options)
            return (moved, *torch.autograd.grad(moved, (q, k), incoming))

        extra[frames] = extra_bytes(work)
    assert max(extra.values()) <= BUDGET, extra


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", ["logits", "features", "none"])
@pytest.mark.parametrize("window", [None, 2])
def test_attention_flow_loss_and_its_gradients(dtype, heads, window):
    """Its gradients are kept in float32 until they are scaled; beside those it stays under the budget."""
    for frames in (3, 16):
        grid, (q, k, _) = scene(frames, dtype)
        q, k = q.requires_grad_(), k.requires_grad_()
        span = {"frames": 2} if frames > 3 and window else {}
        options = {"heads": heads, "window": window, "backend": "streaming", "memory_budget": BUDGET, **span}
        reference = torch.ones_like(ops.soft_displacement(q, k, grid, **options), dtype=torch.int64)

        def loss(q=q, k=k, grid=grid, options=options, reference=reference) -> tuple[Tensor, ...]:
            return (motion.attention_flow_loss(q, k, grid, reference, **options),)

        def gradients(loss=loss, inputs=(q, k)) -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(), inputs)

        kept = 2 * 4 * q.numel()
        scaling = 0 if dtype == torch.float32 else 4 * q.numel()  # one of the two before it is rounded
        tables = 8_000  # of positions, which go with the pass
        assert extra_bytes(loss) <= kept + BUDGET
        returned = 2 * q.element_size() * q.numel()
        assert extra_bytes(gradients) <= max(kept + BUDGET - returned, kept + scaling + tables)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])
def test_operations_without_gradients(dtype, heads):
    grid, (q, k, _) = scene(30, dtype)
    options = {"heads": heads, "backend": "streaming", "memory_budget": BUDGET}
    for work in (
        lambda: (ops.hard_displacement(q, k, grid, frames=1, **options),),
        lambda: tuple(ops.match(q, k, grid, refine=1, **options)),
        lambda: (ops.cost_rows(q, k, grid, range(48), **options),),
        lambda: tuple(ops.attention_mass(q, k, grid, range(48), **options)),
    ):
        assert extra_bytes(work) <= BUDGET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("renormalize", [True, False])
def test_frame_local_attention(dtype, renormalize):
    grid, inputs = scene(12, dtype)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def work() -> tuple[Tensor, ...]:
        options = {"renormalize": renormalize, "backend": "streaming", "memory_budget": BUDGET}
        attended = ops.frame_local_attention(*inputs, grid, **options)
        return (attended, *torch.autograd.grad(attended, inputs, torch.ones_like(attended)))

    incoming = inputs[0].untyped_storage().nbytes()  # the gradient that the test itself makes
    assert extra_bytes(work) - incoming <= BUDGET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [None, "keys", "a frame"])
def test_no_buffer_of_one_round_lives_while_the_next_is_made(dtype, masked):
    """A budget that has room for most rows of a frame at once, so that a second set of buffers would exceed it."""
    budget = 1_500_000
    grid = TokenGrid(3, 16, 24, text_tokens=10)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 4, grid.tokens, 32, generator=generator).to(dtype) for _ in range(3)]
    q, k, _ = inputs
    mask = None if masked is None else (torch.arange(grid.tokens) % 7 != 3).expand(1, -1).clone()
    if mask is not None and masked == "a frame":
        mask[:, grid.frame_slice(1)] = False
    options = {"backend": "streaming", "memory_budget": budget, "key_mask": mask}
    every = range(grid.tokens_per_frame)
    found = {}
    for renormalize in (True, False):
        settings = {"renormalize": renormalize, **options}
        work = lambda settings=settings: (ops.frame_local_attention(*inputs, grid, **settings),)  # noqa: E731
        found["frame-local attention", renormalize] = extra_bytes(work)
    for heads in ("logits", "probabilities", "none"):
        settings = {"heads": heads, **options}
        works = {
            "hard": lambda settings=settings: (ops.hard_displacement(q, k, grid, **settings),),
            "soft": lambda settings=settings: (ops.soft_displacement(q, k, grid, **settings),),
            "match": lambda settings=settings: tuple(ops.match(q, k, grid, **settings)),
            "rows": lambda settings=settings: (ops.cost_rows(q, k, grid, every, **settings),),
            "mass": lambda settings=settings: tuple(ops.attention_mass(q, k, grid, every, **settings)),
        }
        found |= {(name, heads): extra_bytes(work) for name, work in works.items()}
    assert max(found.values()) <= budget, {name: size for name, size in found.items() if size > budget}


def test_a_window_visits_fewer_keys():
    """Work falls with the window: scores computed, counted at the matrix products."""
    grid = TokenGrid(2, 24, 24)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, grid.tokens, 8, generator=generator) for _ in range(2))

    def scores(**options: object) -> int:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            ops.soft_displacement(q, k, grid, backend="streaming", **options)
        products = [event.input_shapes for event in profiler.events() if event.name == "aten::addmm"]
        return sum(shapes[1][0] * shapes[2][1] for shapes in products)

    everything = scores()
    assert everything == 4 * grid.tokens_per_frame**2
    assert scores(frames=[(0, 1)]) == everything // 4
    assert scores(window=2) < everything / 2.5
    shifted = grid.coordinates().view(1, 1, 24, 24, 2) + torch.tensor([4.0, -3.0])
    assert scores(frames=[(0, 1)], window=2, center=shifted) < everything / 4 / 2.5
