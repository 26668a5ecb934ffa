"""The motion flow loss of the streaming backend: what its single pass costs, its precision, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from corrdit import TokenGrid, motion, ops

GRID = TokenGrid(3, 6, 7, text_tokens=2)
HEADS = pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, 2, GRID.tokens, 16, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


def reference_for(heads: str) -> Tensor:
    shape = (1, 2, 3, 3, 6, 7, 2) if heads == "none" else (1, 3, 3, 6, 7, 2)
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(6))


def composed(q: Tensor, k: Tensor, reference: Tensor, *, variant: str = "released", **options: object) -> Tensor:
    return motion.flow_loss(ops.soft_displacement(q, k, GRID, **options), reference, variant=variant)


def products(work: Callable[[], object], width: int) -> float:
    """Matrix products over all pairs of tokens, by the shapes of those that ran."""
    factors = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    count = 0
    for event in profiler.events():
        if event.name in factors:
            left, right = (event.input_shapes[place] for place in factors[event.name])
            count += left[0] * left[1] * right[1]
    return count / (GRID.video_tokens**2 * width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [("logits", 32), ("features", 16), ("none", 32)])
def test_three_products_where_the_composition_takes_four(heads, width, dtype):
    q, k = tensors(dtype)
    reference = reference_for(heads)

    def loss() -> Tensor:
        return motion.attention_flow_loss(q, k, GRID, reference, heads=heads)

    # The sums of weights and positions cost three columns more, once in each look at the scores.
    sums = 3 / (16 if heads == "none" else width)
    assert products(lambda: torch.autograd.grad(loss(), (q, k)), width) == pytest.approx(3 + sums, abs=0.1)
    assert products(lambda: torch.autograd.grad(loss(), k), width) == pytest.approx(3 + sums, abs=0.1)
    k.requires_grad_(False)
    assert products(lambda: torch.autograd.grad(loss(), q), width) == pytest.approx(2 + sums, abs=0.1)
    with torch.no_grad():
        assert products(loss, width) == pytest.approx(1 + sums, abs=0.1)
    assert products(loss, width) == pytest.approx(2 + sums, abs=0.1)
    q.requires_grad_(False)
    assert products(loss, width) == pytest.approx(1 + sums, abs=0.1)
    assert not loss().requires_grad


@HEADS
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("backend", ["streaming", "reference"])
def test_without_gradients_and_for_one_input_alone(heads, variant, backend):
    q, k = tensors()
    reference = reference_for(heads)
    exact = composed(q, k, reference, heads=heads, variant=variant, backend="reference")
    expected = torch.autograd.grad(exact, (q, k))
    options = {"heads": heads, "variant": variant, "backend": backend}
    with torch.no_grad():
        torch.testing.assert_close(motion.attention_flow_loss(q, k, GRID, reference, **options), exact.detach())
    for wanted in (0, 1):
        inputs = [tensor.detach().clone().requires_grad_(number == wanted) for number, tensor in enumerate((q, k))]
        loss = motion.attention_flow_loss(*inputs, GRID, reference, **options)
        (gradient,) = torch.autograd.grad(loss, inputs[wanted])
        torch.testing.assert_close(gradient, expected[wanted], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@HEADS
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_error_of_each_precision_is_that_of_its_rounding(dtype, heads, scale):
    """At a scale of the loss as in mixed precision too, where gradients of the loss itself underflow in float16."""
    q, k = tensors(dtype)
    reference = reference_for(heads)
    temperature = 2.0 if scale == 1 else 1e-4
    results = []
    for inputs, backend in (((q.double(), k.double()), "reference"), ((q, k), "streaming")):
        inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        loss = motion.attention_flow_loss(
            *inputs, GRID, reference, heads=heads, temperature=temperature, backend=backend
        )
        results.append((loss, *torch.autograd.grad(scale * loss, inputs)))
    assert results[1][0].dtype == torch.float32
    assert results[1][1].dtype == dtype
    steps = (2e-6, *[torch.finfo(dtype).eps + 4e-6] * 2)
    for exact, rounded, step in zip(*results, steps, strict=True):
        assert (exact - rounded.double()).abs().max() <= step * exact.abs().max()


@pytest.mark.parametrize("heads", ["logits", "features", "none"])
@pytest.mark.parametrize("window", [None, 2])
def test_one_query_row_at_a_time(heads, window):
    """Under the smallest budget there is, so that a frame pair takes as many blocks as it has queries."""
    q, k = tensors()
    reference = reference_for(heads)
    options = {"heads": heads, "window": window}
    with pytest.raises(ValueError, match="too small for the loss of soft displacement") as refusal:
        motion.attention_flow_loss(q, k, GRID, reference, memory_budget=100, **options)
    enough = int(str(refusal.value).split(" needs ")[1].split()[0])
    loss = motion.attention_flow_loss(q, k, GRID, reference, memory_budget=enough, **options)
    exact = composed(q, k, reference, backend="reference", **options)
    torch.testing.assert_close(loss, exact, rtol=1e-10, atol=0)
    for one, other in zip(*(torch.autograd.grad(total, (q, k)) for total in (loss, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_graph_that_is_kept_gives_its_gradient_again_and_autocast_changes_nothing():
    q, k = tensors(torch.float32)
    reference = reference_for("logits")
    loss = motion.attention_flow_loss(q, k, GRID, reference)
    first = torch.autograd.grad(loss, (q, k), retain_graph=True)
    again = torch.autograd.grad(3 * loss, (q, k))
    for one, three in zip(first, again, strict=True):
        torch.testing.assert_close(3 * one, three)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = motion.attention_flow_loss(q, k, GRID, reference)
        gradients = torch.autograd.grad(under_autocast, (q, k))
    assert all(map(torch.equal, (loss, *first), (under_autocast, *gradients)))


def test_rows_without_keys_count_as_standing_still():
    q, k = tensors()
    mask = torch.ones(1, GRID.tokens, dtype=torch.bool)
    mask[:, GRID.frame_slice(1)] = False
    loss = motion.attention_flow_loss(q, k, GRID, torch.ones(1, 3, 3, 6, 7, 2), frames=None, key_mask=mask)
    exact = composed(q, k, torch.ones(1, 3, 3, 6, 7, 2), key_mask=mask, backend="reference")
    torch.testing.assert_close(loss, exact)
    dq, dk = torch.autograd.grad(loss, (q, k))
    assert dq.isfinite().all()
    assert not dk[:, :, GRID.frame_slice(1)].any()
    assert not dq[:, :, : GRID.text_tokens].any()


def test_a_nan_reaches_the_loss_also_where_nothing_moves():
    q, k = tensors()
    reference = reference_for("logits")
    reference[:, 1, :, 2, 3] = 0
    with torch.no_grad():
        q[0, 0, GRID.token(1, 2, 3)] = float("nan")
    loss = motion.attention_flow_loss(q, k, GRID, reference)
    assert loss.isnan()
    assert composed(q, k, reference, backend="reference").isnan()


def test_second_derivatives_are_refused():
    q, k = tensors()
    loss = motion.attention_flow_loss(q, k, GRID, reference_for("logits"), backend="streaming")
    first, _ = torch.autograd.grad(loss, (q, k), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(first.sum(), q)


def test_the_reference_may_be_differentiated_too():
    q, k = tensors()
    reference = reference_for("logits").double().requires_grad_()
    loss = motion.attention_flow_loss(q, k, GRID, reference, variant="paper")
    (gradient,) = torch.autograd.grad(loss, reference)
    torch.testing.assert_close(gradient, 2 * (reference - ops.soft_displacement(q, k, GRID)).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": torch.zeros(1, 3, 3, 6, 7, 2)}, "nothing in it moves"),
        ({"reference": torch.ones(1, 9, 6, 7, 2)}, r"displacements \[1, 3, 3, 6, 7, 2\], got \[1, 9, 6, 7, 2\]"),
        ({"heads": "none"}, r"displacements \[1, 2, 3, 3, 6, 7, 2\]"),
        ({"frames": [(0, 1)]}, r"displacements \[1, 1, 6, 7, 2\]"),
        ({"reference": None}, "got NoneType"),
        ({"variant": "mean"}, "variant must be one of 'released', 'paper'"),
        ({"temperature": 0}, "temperature"),
    ],
    ids=str,
)
def test_what_is_refused(change, message):
    q, k = tensors()
    options = {"reference": reference_for("logits"), **change}
    with pytest.raises(ValueError, match=message):
        motion.attention_flow_loss(q, k, GRID, **options)


@pytest.mark.parametrize("heads", ["logits", "none"])
@pytest.mark.parametrize("variant", ["released", "paper", "pairs"])
def test_weights_of_the_vectors_are_those_of_the_composition(heads, variant):
    q, k = tensors()
    reference = reference_for(heads)
    weights = torch.rand(3, 3, 6, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights[0, 1] = 0
    flow = ops.soft_displacement(q, k, GRID, heads=heads, backend="reference")
    squared = (flow - reference).square() * weights[..., None]
    if variant == "released":
        moving = (reference != 0).any(-1, keepdim=True)
        exact = (squared * moving).sum() / (2 * (weights[..., None] * moving).sum())
    else:
        exact = squared.sum() / (1 if variant == "paper" else flow.shape[:-3].numel())
    options = {"heads": heads, "variant": variant, "weights": weights}
    for backend in ("streaming", "reference"):
        loss = motion.attention_flow_loss(q, k, GRID, reference, backend=backend, **options)
        torch.testing.assert_close(loss, exact)
        torch.testing.assert_close(
            torch.autograd.grad(loss, (q, k)), torch.autograd.grad(exact, (q, k), retain_graph=True)
        )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(5), r"broadcasts to the vectors \[1, 3, 3, 6, 7\], got \[5\]"),
        (torch.zeros(7), "weights are all zero"),
        ([1.0], "must be a tensor that broadcasts"),
    ],
    ids=["shape", "zero", "list"],
)
def test_weights_that_cannot_serve(weights, message):
    q, k = tensors()
    with pytest.raises(ValueError, match=message):
        motion.attention_flow_loss(q, k, GRID, reference_for("logits"), weights=weights)
