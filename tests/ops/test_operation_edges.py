"""NaN, empty rows, gradients by finite differences, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, motion, ops

BACKENDS = pytest.mark.parametrize("backend", ["reference", "streaming"])
HEADS = pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])
GRID = TokenGrid(3, 4, 5, text_tokens=2)


def tensors(count: int = 3, heads: int = 2, dtype: torch.dtype = torch.float64, grid: TokenGrid = GRID) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, grid.tokens, 8, generator=generator, dtype=dtype) for _ in range(count)]


@BACKENDS
@HEADS
@pytest.mark.parametrize("options", [{}, {"window": 1, "frames": [(0, 1), (1, 1)]}], ids=str)
def test_gradients_are_finite_differences(backend, heads, options):
    grid = TokenGrid(2, 2, 3, text_tokens=1)
    q, k = (tensor[:1, :, :, :1].clone().requires_grad_() for tensor in tensors(2, grid=grid))

    def moved(q: Tensor, k: Tensor) -> Tensor:
        return ops.soft_displacement(q, k, grid, heads=heads, temperature=2.0, backend=backend, **options)

    assert torch.autograd.gradcheck(moved, (q, k))


@BACKENDS
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("span", [0, 1])
def test_gradients_of_frame_local_attention_are_finite_differences(backend, renormalize, span):
    grid = TokenGrid(3, 1, 2, text_tokens=1)
    inputs = [tensor[:1, :1, :, :2].clone().requires_grad_() for tensor in tensors(3, grid=grid)]

    def attended(*inputs: Tensor) -> Tensor:
        return ops.frame_local_attention(*inputs, grid, renormalize=renormalize, span=span, backend=backend)

    assert torch.autograd.gradcheck(attended, inputs)


def test_second_derivatives_are_refused():
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    for result in (
        ops.soft_displacement(q, k, GRID, backend="streaming"),
        ops.frame_local_attention(q, k, v, GRID, backend="streaming"),
    ):
        (first,) = torch.autograd.grad(result.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(first.sum(), q)


@BACKENDS
@HEADS
def test_only_the_gradient_asked_for(backend, heads):
    q, k = tensors(2)
    with_both = [tensor.clone().requires_grad_() for tensor in (q, k)]
    expected = torch.autograd.grad(ops.soft_displacement(*with_both, GRID, heads=heads).square().sum(), with_both)
    for wanted in (0, 1):
        inputs = [tensor.clone().requires_grad_(number == wanted) for number, tensor in enumerate((q, k))]
        result = ops.soft_displacement(*inputs, GRID, heads=heads, backend=backend).square().sum()
        (gradient,) = torch.autograd.grad(result, inputs[wanted])
        torch.testing.assert_close(gradient, expected[wanted], rtol=1e-10, atol=1e-12)


@BACKENDS
@HEADS
@pytest.mark.parametrize("window", [None, 1])
def test_nan_stays_in_its_rows(backend, heads, window):
    q, k = tensors(2)
    clean = ops.soft_displacement(q, k, GRID, heads=heads, window=window, backend=backend)
    query, key = GRID.token(1, 2, 3), GRID.token(2, 0, 0)
    q[0, :, query] = float("nan")
    k[1, :, key] = float("nan")
    moved = ops.soft_displacement(q, k, GRID, heads=heads, window=window, backend=backend)
    head_axes = [slice(None)] if heads == "none" else []
    # The NaN query spoils its own row towards every frame, the NaN key the rows that can see it.
    assert moved[(0, *head_axes, 1, slice(None), 2, 3)].isnan().all()
    seeing = slice(None) if window is None else slice(0, window + 1)
    assert moved[(1, *head_axes, slice(None), 2, seeing, seeing)].isnan().all()
    moved[(0, *head_axes, 1, slice(None), 2, 3)] = clean[(0, *head_axes, 1, slice(None), 2, 3)]
    moved[(1, *head_axes, slice(None), 2, seeing, seeing)] = clean[(1, *head_axes, slice(None), 2, seeing, seeing)]
    torch.testing.assert_close(moved, clean, rtol=1e-10, atol=1e-10)


@BACKENDS
def test_nan_of_hard_displacement_is_that_of_argmax(backend):
    q, k = tensors(2)
    k[0, :, GRID.token(2, 1, 4)] = float("nan")
    moved = ops.hard_displacement(q, k, GRID, backend=backend)
    place = moved[0, :, 2] + GRID.coordinates(dtype=torch.float64).long().view(4, 5, 2)
    assert torch.equal(place, torch.tensor([4, 1]).expand_as(place))


@BACKENDS
@pytest.mark.parametrize("heads", ["logits", "none"])
def test_scores_of_minus_infinity_still_go_to_an_allowed_key(backend, heads):
    q, k = (torch.ones_like(tensor) for tensor in tensors(2))
    q[..., 0] = float("-inf")
    mask = torch.ones(2, GRID.tokens, dtype=torch.bool)
    mask[:, GRID.token(1, 0, 0)] = False
    moved = ops.hard_displacement(q, k, GRID, heads=heads, key_mask=mask, frames=[(0, 0), (0, 1)], backend=backend)
    place = moved + GRID.coordinates(dtype=torch.float64).long().view(4, 5, 2)
    first_allowed = torch.tensor([[0, 0], [1, 0]])[:, None, None]
    assert torch.equal(place, first_allowed.expand_as(place))


@BACKENDS
@HEADS
def test_rows_without_keys_give_zero(backend, heads):
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    mask = torch.ones(2, GRID.tokens, dtype=torch.bool)
    mask[0, GRID.frame_slice(1)] = False
    options = {"heads": heads, "key_mask": mask, "backend": backend}
    head_axes = [slice(None)] if heads == "none" else []
    for operation in (ops.soft_displacement, ops.hard_displacement):
        for window in (None, 1):
            moved = operation(q, k, GRID, window=window, **options)
            assert not moved[(0, *head_axes, slice(None), 1)].any()
            assert moved[(0, *head_axes, slice(None), 0)].any()
    gradients = torch.autograd.grad(ops.soft_displacement(q, k, GRID, **options).sum(), (q, k))
    assert all(gradient.isfinite().all() for gradient in gradients)
    mask[1] = False
    score = ops.match(q, k, GRID, **options).score
    assert not score[1].any()
    assert not ops.cost_rows(q, k, GRID, [3], **options)[1].any()
    assert not any(part[1].any() for part in ops.attention_mass(q, k, GRID, [3], **options))
    for renormalize in (True, False):
        attended = ops.frame_local_attention(q, k, v, GRID, key_mask=mask, renormalize=renormalize, backend=backend)
        assert not attended[1].any()
        gradients = torch.autograd.grad(attended.sum(), (q, k, v))
        assert all(gradient.isfinite().all() for gradient in gradients)


@BACKENDS
@HEADS
@pytest.mark.parametrize("spoiling", [float("nan"), float("inf"), float("-inf")])
def test_what_is_under_the_mask_reaches_nothing(backend, heads, spoiling):
    q, k, v = tensors()
    mask = torch.ones(2, GRID.tokens, dtype=torch.bool)
    removed = [0, GRID.token(0, 1, 1), GRID.token(2, 3, 0)]
    mask[:, removed] = False
    options = {"key_mask": mask, "backend": backend}
    results = []
    for value in (0.0, spoiling):
        k[:, :, removed] = v[:, :, removed] = value
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        moved = [
            ops.soft_displacement(*inputs[:2], GRID, heads=heads, window=window, **options) for window in (None, 2)
        ]
        attended = [
            part
            for renormalize in (True, False)
            for part in ops.frame_local_attention(*inputs, GRID, renormalize=renormalize, return_lse=True, **options)
        ]
        loss = sum(result.square().sum() for result in (*moved, *attended))
        found = [*ops.match(*inputs[:2], GRID, heads=heads, refine=1, **options)]
        found += [ops.hard_displacement(*inputs[:2], GRID, heads=heads, window=w, **options) for w in (None, 2)]
        found.append(ops.cost_rows(*inputs[:2], GRID, [3], heads=heads, **options))
        found += ops.attention_mass(*inputs[:2], GRID, [3], heads=heads, **options)
        results.append([*moved, *attended, *found, *torch.autograd.grad(loss, inputs)])
    for clean, spoiled in zip(*results, strict=True):
        assert torch.equal(clean, spoiled)


@BACKENDS
@pytest.mark.parametrize("spoiling", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("span", [0, 1])
def test_a_token_that_a_query_does_not_see_does_not_reach_it(backend, spoiling, renormalize, span):
    """Without renormalisation an unseen key counts in the softmax, but its value counts nowhere."""
    results = []
    rows = GRID.frame_slice(0)
    for value in (0.0, spoiling):
        q, k, v = tensors()
        v[:, :, GRID.frame_slice(2)] = value
        if renormalize:
            k[:, :, GRID.frame_slice(2)] = value
        attended = ops.frame_local_attention(q, k, v, GRID, renormalize=renormalize, span=span, backend=backend)
        assert attended[:, :, GRID.frame_slice(2)].isfinite().all() == (value == 0.0)
        results.append(attended[:, :, rows])
    assert torch.equal(*results)


@BACKENDS
@HEADS
@pytest.mark.parametrize("spoiling", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("loss", [False, True])
def test_a_key_outside_the_window_of_a_query_does_not_reach_its_gradient(backend, heads, spoiling, loss):
    """Its score is masked, but in the backward pass the 0 of that mask would multiply the key."""
    key = GRID.token(1, 0, 0)
    seeing = torch.zeros(3, 4, 5, dtype=torch.bool)
    seeing[:, :2, :2] = True
    gradients = []
    for value in (0.0, spoiling):
        q, k = tensors(2)
        k[:, :, key] = value
        inputs = [tensor.requires_grad_() for tensor in (q, k)]
        options = {"heads": heads, "window": 1, "backend": backend}
        if loss:
            shape = (2, *([2] if heads == "none" else []), 3, 3, 4, 5, 2)
            error = motion.attention_flow_loss(*inputs, GRID, torch.ones(shape), **options)
        else:
            error = ops.soft_displacement(*inputs, GRID, **options).square().sum()
        gradients.append(torch.autograd.grad(error, q)[0][:, :, GRID.text_tokens :])
    clean, spoiled = gradients
    assert torch.equal(clean[:, :, ~seeing.flatten()], spoiled[:, :, ~seeing.flatten()])
    if math.isnan(spoiling):
        assert spoiled[:, :, seeing.flatten()].isnan().all()


@BACKENDS
@HEADS
def test_autocast_does_not_lower_the_precision(backend, heads):
    q, k, v = tensors(dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            moved = ops.soft_displacement(q, k, GRID, heads=heads, backend=backend)
            found = ops.match(q, k, GRID, heads=heads, refine=1, backend=backend)
            rows = ops.cost_rows(q, k, GRID, [3], heads=heads, backend=backend)
            mass = ops.attention_mass(q, k, GRID, [3], heads=heads, backend=backend)
            attended = ops.frame_local_attention(*inputs, GRID, backend=backend)
            gradients: tuple[Tensor, ...] = ()
            if backend == "streaming":  # plain PyTorch leaves the precision of its backward pass to the caller
                gradients = torch.autograd.grad(moved.sum() + attended.square().sum(), inputs)
        results.append([moved, *found, rows, *mass, attended, *gradients])
    for plain, under_autocast in zip(*results, strict=True):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


@pytest.mark.parametrize("operation", ["soft_displacement", "hard_displacement", "match", "cost_rows"])
def test_a_budget_below_one_row_is_refused(operation):
    q, k = tensors(2)
    extra = ([3],) if operation == "cost_rows" else ()
    with pytest.raises(ValueError, match=r"memory_budget=100 bytes is too small.* needs (\d+) bytes") as refusal:
        getattr(ops, operation)(q, k, GRID, *extra, backend="streaming", memory_budget=100)
    enough = int(str(refusal.value).split(" needs ")[1].split()[0])
    getattr(ops, operation)(q, k, GRID, *extra, backend="streaming", memory_budget=enough)


def test_a_budget_below_one_row_of_attention_is_refused():
    q, k, v = tensors()
    for call in (
        lambda budget: ops.attention_mass(q, k, GRID, [3], backend="streaming", memory_budget=budget),
        lambda budget: ops.frame_local_attention(q, k, v, GRID, backend="streaming", memory_budget=budget),
    ):
        with pytest.raises(ValueError, match="too small"):
            call(100)
        call(20_000)


def test_a_budget_that_only_the_gradient_exceeds_is_refused_before_the_work():
    q, k = tensors(2)
    with pytest.raises(ValueError, match="too small") as refusal:
        ops.soft_displacement(q, k, GRID, backend="streaming", memory_budget=100)
    enough_forward = int(str(refusal.value).split(" needs ")[1].split()[0])
    with pytest.raises(ValueError, match="backward pass"):
        ops.soft_displacement(q.requires_grad_(), k, GRID, backend="streaming", memory_budget=enough_forward)


@pytest.mark.parametrize("operation", ["soft_displacement", "match"])
def test_a_compiled_caller_of_any_shape_is_one_graph(operation):
    def caller(q: Tensor, k: Tensor) -> Tensor:
        if operation == "soft_displacement":
            return ops.soft_displacement(q, k, GRID, scale=0.3, frames=[(0, 1)], backend="reference")
        return ops.match(q, k, GRID, scale=0.3, targets=[1], backend="reference").score

    compiled = torch.compile(caller, fullgraph=True, dynamic=True, backend="eager")
    for heads in (2, 3):
        q, k = tensors(2, heads=heads)
        torch.testing.assert_close(compiled(q, k), caller(q, k))


@pytest.mark.parametrize("what", ["key_mask", "center", "attention"])
def test_a_mask_that_changes_before_the_backward_pass_is_noticed(what):
    """Autograd's own refusal: the gradient of another mask would be wrong without a word."""
    grid = TokenGrid(2, 3, 4)
    q = torch.randn(1, 2, grid.tokens, 16, requires_grad=True)
    mask, center = torch.ones(1, grid.tokens, dtype=torch.bool), torch.zeros(1, 2, 2, 3, 4, 2)
    if what == "key_mask":
        result = ops.soft_displacement(q, q, grid, key_mask=mask, backend="streaming")
    elif what == "center":
        result = ops.soft_displacement(q, q, grid, center=center, window=1, backend="streaming")
    else:
        result = ops.frame_local_attention(q, q, q, grid, key_mask=mask, backend="streaming")
    mask[:, ::2] = False
    center += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()
