"""What an option leaves out is not computed: matrix products of the kernels are counted, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, ops

# 12 rows of 8 tokens: a tile of 16 is two rows, with a window a block of 4 x 4; a frame is six tiles.
FRAME = TokenGrid(1, 12, 8)
LONG = TokenGrid(4, 2, 8)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """`products(work)`: how many tile products `work` computes."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = [0]
    create_dot = InterpreterBuilder.create_dot

    def watched(*arguments: Any) -> Any:
        counted[0] += 1
        return create_dot(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", watched)

    def count(work: Callable[[], Any]) -> int:
        counted[0] = 0
        work()
        return counted[0]

    return count


def tensors(grid: TokenGrid, count: int = 2, heads: int = 1) -> list[Tensor]:
    return [torch.randn(1, heads, grid.tokens, 16, requires_grad=True) for _ in range(count)]


# Tiles of keys for the six tiles of queries: all; two by two for the 6 x 6 or 8 x 6 keys round a block, or, in the
# gradient of averaged logits, two rows round the two of a tile (two border tiles see one less); their own.
@pytest.mark.parametrize(("window", "tiles", "rows"), [(None, 36, 36), (2, 24, 16), (0, 6, 6)])
@pytest.mark.parametrize(("heads", "head_count", "forward", "backward"), [("none", 1, 2, 6), ("logits", 2, 3, 3)])
def test_gradients_visit_the_tiles_of_the_window(products, heads, head_count, forward, backward, window, tiles, rows):
    q, k = tensors(FRAME, heads=head_count)
    found: list[Tensor] = []

    def move() -> None:
        found.append(ops.soft_displacement(q, k, FRAME, heads=heads, window=window, backend="triton"))

    # A tile takes a product for the scores of each head and one for the coordinates; its gradients three for dq and
    # three for dk of single heads, and for averaged logits (whose last two products are of PyTorch) one for the planes.
    assert products(move) == forward * tiles
    in_gradient = backward * (tiles if heads == "none" else rows)
    assert products(lambda: torch.autograd.grad(found[0].square().sum(), (q, k))) == in_gradient


@pytest.mark.parametrize("heads", ["none", "logits"])
def test_pairs_that_are_not_asked_for_cost_nothing(products, heads):
    q, k = tensors(LONG)

    def work(frames: Any) -> Callable[[], Any]:
        return lambda: ops.soft_displacement(q, k, LONG, heads=heads, frames=frames, backend="triton").sum().backward()

    one = products(work([(2, 0)]))
    assert products(work([(2, 0), (0, 1), (3, 3)])) == 3 * one
    assert products(work(0)) == 4 * one
    assert products(work(None)) == 16 * one


@pytest.mark.parametrize("heads", ["logits", "probabilities"])
def test_heads_of_weight_0_cost_nothing(products, heads):
    grid = TokenGrid(2, 1, 8)
    q, k = tensors(grid, heads=3)

    def work(q: Tensor, k: Tensor, weights: list[float]) -> Callable[[], Any]:
        options = {"heads": heads, "head_weights": weights, "backend": "triton"}
        return lambda: ops.soft_displacement(q, k, grid, **options).sum().backward()

    assert products(work(q, k, [1.0, 0.0, 2.0])) == products(work(q[:, :2], k[:, :2], [1.0, 2.0]))
    assert products(work(q, k, [0.0, 0.0, 2.0])) == products(work(q[:, :1], k[:, :1], [2.0]))


def test_a_moved_window_visits_the_tiles_where_it_is(products):
    q, k = tensors(FRAME)
    far = torch.zeros(1, 1, 1, 12, 8, 2)
    far[..., 1] = 11.0
    options: dict[str, Any] = {"heads": "none", "window": 0, "backend": "triton"}
    found: list[Tensor] = []
    assert products(lambda: found.append(ops.soft_displacement(q, k, FRAME, center=far, **options))) == 2 * 6
    assert products(lambda: torch.autograd.grad(found[0].sum(), (q, k))) == 6 * 6


def test_matching_costs_one_pass_a_direction_and_target(products):
    q, k = tensors(LONG)
    both = {targets: products(lambda t=targets: ops.match(q, k, LONG, targets=t, backend="triton")) for targets in
            ((1,), (1, 3))}  # fmt: skip
    forward = products(lambda: ops.match(q, k, LONG, targets=[1], bidirectional=False, backend="triton"))
    # A frame is one tile: log-sum-exps take a product for scores and one for coordinates, the cost one.
    assert both == {(1,): 2 * 2 + 2, (1, 3): 2 * (2 * 2 + 2)}
    assert forward == 2 + 1


def test_frame_local_attention_costs_its_own_frames(products):
    q, k, v = tensors(LONG, 3)

    def work(**options: Any) -> Callable[[], Any]:
        return lambda: ops.frame_local_attention(q, k, v, LONG, backend="triton", **options).sum().backward()

    # Scores and values forward; scores, values and dq, then scores, dv, values and dk backward, for each tile.
    own = products(work())
    assert own == 4 * (2 + 3 + 4)
    assert products(work(span=1)) == (4 + 2 * 3) * 9
    # Frames out of reach take part in the softmax alone: no product with their values.
    assert products(work(renormalize=False)) == own + 12 * (1 + 2 + 2)


@pytest.mark.parametrize(
    ("asked", "own", "others"), [("q", 3, 2), ("k", 3, 2), ("v", 2, 0), ("kv", 4, 2), ("qkv", 3 + 4, 2 + 2)]
)
def test_a_gradient_of_frame_local_attention_costs_its_own_products(products, asked, own, others):
    inputs = dict(zip("qkv", tensors(LONG, 3), strict=True))
    leaves = [inputs[name] for name in asked]
    given = [tensor if name in asked else tensor.detach() for name, tensor in inputs.items()]
    for renormalize, pairs in ((True, 0), (False, 12)):
        found = ops.frame_local_attention(*given, LONG, renormalize=renormalize, backend="triton")
        # Of an own frame scores with a product for each gradient and, for all but dv, one with the values.
        assert products(lambda found=found: torch.autograd.grad(found.sum(), leaves)) == 4 * own + pairs * others
