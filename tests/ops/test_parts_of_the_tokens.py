"""Operations on a part of the tokens: rows of the whole problem, shards of its keys, fewer key heads, merged shards.

The whole problem of the reference in float64 is the truth of every one of them, forward and backward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from corrdit import TokenGrid, ops

BACKENDS = pytest.mark.parametrize("backend", ["reference", "streaming"])
BUDGETED = {"reference": {"backend": "reference"}, "streaming": {"backend": "streaming", "memory_budget": 60_000}}
HEADS = pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])
GRID = TokenGrid(4, 3, 5, text_tokens=2)
S = GRID.tokens_per_frame
# Within a frame, over frames with both ends inside one, whole frames, everything.
RANGES = pytest.mark.parametrize("held", [(17, 26), (7, 52), (15, 45), (0, 60)], ids=str)

thorough = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def tensors(count: int = 3, grid: TokenGrid = GRID, heads: int = 4, key_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    counts = [heads] + [key_heads] * (count - 1)
    drawn = [torch.randn(2, number, grid.tokens, 6, generator=generator, dtype=torch.float64) for number in counts]
    return [tensor.requires_grad_() for tensor in drawn]


def video_tokens(tensor: Tensor, held: tuple[int, int], grid: TokenGrid = GRID) -> Tensor:
    return tensor[:, :, grid.video_slice][:, :, slice(*held)]


def some_mask(grid: TokenGrid = GRID) -> Tensor:
    return torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(8)) > 0.3


def removed_outside(held: tuple[int, int], mask: Tensor | None = None, grid: TokenGrid = GRID) -> Tensor:
    """The mask of the whole problem that a shard of keys is; without text."""
    kept = torch.zeros(2, grid.tokens, dtype=torch.bool)
    kept[:, grid.video_slice][:, slice(*held)] = True
    return kept if mask is None else kept & mask


def assert_same(
    found: Tensor | tuple[Tensor, ...], exact: Tensor | tuple[Tensor, ...], inputs: Sequence[Tensor]
) -> None:
    """Values, and the gradients of a weighted sum of them."""
    pairs = []
    for mine, theirs in zip(
        (found,) if isinstance(found, Tensor) else found, (exact,) if isinstance(exact, Tensor) else exact, strict=True
    ):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        if mine.requires_grad:
            weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9), dtype=mine.dtype)
            finite = theirs.isfinite()
            pairs.append([(one.masked_fill(~finite, 0.0) * weights).sum() for one in (mine, theirs)])
    if pairs:
        gradients = [torch.autograd.grad(sum(parts), inputs, retain_graph=True) for parts in zip(*pairs, strict=True)]
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def rows_of_range(field: Tensor, held: tuple[int, int], *, heads: str) -> Tensor:
    """`[B, (H,) F, K, h, w, ...]` -> `[B, (H,) n, K, ...]`."""
    axis = 2 if heads == "none" else 1
    by_query = field.movedim(axis + 1, axis + 3).flatten(axis, axis + 2)
    return by_query.narrow(axis, held[0], held[1] - held[0])


@BACKENDS
@HEADS
@RANGES
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 2, "center": True, "key_mask": True}], ids=str)
def test_displacement_of_a_range_of_queries(backend, heads, held, options):
    q, k = tensors(2)
    options = dict(options)
    center = None
    if options.pop("center", False):
        center = torch.rand(2, 4, 4, 3, 5, 2, generator=torch.Generator().manual_seed(6)) * 7 - 1
    mask = some_mask() if options.pop("key_mask", False) else None
    lse = {} if heads == "probabilities" else {"return_lse": True}
    common = {"heads": heads, "key_mask": mask, "temperature": 1.7, **options}
    whole = functools.partial(rows_of_range, held=held, heads=heads)
    own = None if center is None else rows_of_range(center, held, heads="logits")
    exact = ops.soft_displacement(q, k, GRID, backend="reference", center=center, **common, **lse)
    part = {"queries": held, "center": own, **BUDGETED[backend], **common}
    found = ops.soft_displacement(video_tokens(q, held), k, GRID, **part, **lse)
    if lse:
        exact, found = tuple(map(whole, exact)), tuple(found)
    else:
        exact = whole(exact)
    assert_same(found, exact, (q, k))
    best = ops.hard_displacement(q, k, GRID, backend="reference", center=center, **common)
    assert torch.equal(ops.hard_displacement(video_tokens(q, held), k, GRID, **part), whole(best))


@BACKENDS
@HEADS
@pytest.mark.parametrize("window", [None, 1])
def test_displacement_of_chosen_frames(backend, heads, window):
    q, k = tensors(2)
    chosen = [2, 0]
    kept = torch.cat([q[:, :, GRID.frame_slice(frame)] for frame in chosen], 2)
    axis = 2 if heads == "none" else 1
    common: dict[str, Any] = {"heads": heads, "window": window}
    exact = ops.soft_displacement(q, k, GRID, backend="reference", **common)
    part = {"query_frames": chosen, "backend": backend, **common}
    found = ops.soft_displacement(kept, k, GRID, **part)
    assert_same(found, exact.index_select(axis, torch.tensor(chosen)), (q, k))
    # With the text at its end of the axis.
    with_text = torch.cat((q[:, :, GRID.text_slice], kept), 2)
    assert torch.equal(ops.soft_displacement(with_text, k, GRID, **part), found)
    pairs = [(0, 3), (2, 1), (0, 0)]
    exact = ops.soft_displacement(q, k, GRID, backend="reference", frames=pairs, **common)
    assert_same(ops.soft_displacement(kept, k, GRID, frames=pairs, **part), exact, (q, k))
    near = [(2, 1), (2, 2), (2, 3), (0, 0), (0, 1)]
    exact = ops.soft_displacement(q, k, GRID, backend="reference", frames=near, **common)
    assert_same(ops.soft_displacement(kept, k, GRID, frames=1, **part), exact, (q, k))


@BACKENDS
def test_a_range_with_pairs_has_the_pairs_of_its_frame(backend):
    q, k = tensors(2)
    held = (17, 26)
    whole = ops.soft_displacement(q, k, GRID, frames=[(1, 3), (1, 0)], backend="reference")
    own = [(1, 3), (1, 0)]
    found = ops.soft_displacement(video_tokens(q, held), k, GRID, frames=own, queries=held, backend=backend)
    assert_same(found, whole.flatten(2, 3)[:, :, 2:11].transpose(1, 2), (q, k))
    span = ops.soft_displacement(q, k, GRID, frames=[(1, 0), (1, 1), (1, 2)], backend="reference")
    found = ops.soft_displacement(video_tokens(q, held), k, GRID, frames=torch.tensor(1), queries=held, backend=backend)
    assert_same(found, span.flatten(2, 3)[:, :, 2:11].transpose(1, 2), (q, k))
    with pytest.raises(ValueError, match=r"frames \[0, 1\] are in \[2, 3\] of them; give a range within one frame"):
        ops.soft_displacement(video_tokens(q, (7, 26)), k, GRID, frames=1, queries=(7, 26), backend=backend)
    with pytest.raises(ValueError, match=r"asks for queries of frame 2, but q holds those of frames \[1\]"):
        ops.soft_displacement(video_tokens(q, held), k, GRID, frames=[(2, 0)], queries=held, backend=backend)


@BACKENDS
@HEADS
@RANGES
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"key_mask": True}], ids=str)
def test_displacement_over_a_shard_of_keys(backend, heads, held, options):
    q, k = tensors(2)
    window, mask = options.get("window"), some_mask() if "key_mask" in options else None
    lse = {} if heads == "probabilities" else {"return_lse": True}
    common: dict[str, Any] = {"heads": heads, "window": window}
    exact = ops.soft_displacement(
        q, k, GRID, key_mask=removed_outside(held, mask), backend="reference", **common, **lse
    )
    part = {"keys": held, **BUDGETED[backend], **common}
    shard = video_tokens(k, held)
    assert_same(ops.soft_displacement(q, shard, GRID, key_mask=mask, **part, **lse), exact, (q, k))
    if mask is not None:  # a mask of the shard's own tokens says the same as one of all
        own = mask[:, GRID.video_slice][:, slice(*held)]
        assert_same(ops.soft_displacement(q, shard, GRID, key_mask=own, **part, **lse), exact, (q, k))
    best = ops.hard_displacement(q, k, GRID, key_mask=removed_outside(held, mask), backend="reference", **common)
    assert torch.equal(ops.hard_displacement(q, shard, GRID, key_mask=mask, **part), best)


def shards(limits: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(limits))


@BACKENDS
@pytest.mark.parametrize("heads", ["logits", "features", "none"])
@pytest.mark.parametrize("limits", [(0, 60), (0, 15, 60), (0, 7, 29, 30, 60)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"key_mask": True}], ids=str)
def test_merged_shards_are_the_whole_displacement(backend, heads, limits, options):
    q, k = tensors(2)
    common: dict[str, Any] = {"heads": heads, "temperature": 2.0, **options}
    if "key_mask" in options:
        common["key_mask"] = some_mask()
        common["key_mask"][1, GRID.frame_slice(2)] = False  # no shard has a key there
    exact = ops.soft_displacement(q, k, GRID, backend="reference", return_lse=True, **common)
    found = [
        ops.soft_displacement(q, video_tokens(k, held), GRID, keys=held, return_lse=True, backend=backend, **common)
        for held in shards(limits)
    ]
    results, lses = zip(*found, strict=True)
    assert_same((ops.merge(results, lses), torch.stack(lses).logsumexp(0)), exact, (q, k))


@BACKENDS
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("span", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_frame_local_attention_in_parts(backend, renormalize, span, masked):
    q, k, v = inputs = tensors(3)
    mask = some_mask() if masked else None
    if mask is not None:
        mask[1, GRID.text_slice] = mask[1, GRID.frame_slice(2)] = False  # rows without any key
    common: dict[str, Any] = {"renormalize": renormalize, "span": span, "return_lse": True}
    exact = ops.frame_local_attention(q, k, v, GRID, key_mask=mask, backend="reference", **common)
    part = {**BUDGETED[backend], "key_mask": mask, **common}
    for held in [(17, 26), (7, 52), (0, 60)]:
        found = ops.frame_local_attention(video_tokens(q, held), k, v, GRID, queries=held, **part)
        assert_same(found, tuple(one[:, :, GRID.video_slice][:, :, slice(*held)] for one in exact), inputs)
    chosen = [3, 1]
    places = torch.cat([torch.arange(GRID.tokens)[GRID.frame_slice(frame)] for frame in chosen])
    found = ops.frame_local_attention(q[:, :, places], k, v, GRID, query_frames=chosen, **part)
    assert_same(found, tuple(one[:, :, places] for one in exact), inputs)
    places = torch.cat((torch.arange(GRID.tokens)[GRID.text_slice], places))
    found = ops.frame_local_attention(q[:, :, places], k, v, GRID, query_frames=chosen, **part)
    assert_same(found, tuple(one[:, :, places] for one in exact), inputs)
    # Shards of keys, the first of which holds the text.
    found = []
    for number, held in enumerate(shards((0, 7, 29, 30, 60))):
        own = torch.arange(GRID.tokens)[GRID.video_slice][slice(*held)]
        if number == 0:
            own = torch.cat((torch.arange(GRID.tokens)[GRID.text_slice], own))
        found.append(ops.frame_local_attention(q, k[:, :, own], v[:, :, own], GRID, keys=held, **part))
    results, lses = zip(*found, strict=True)
    assert_same((ops.merge(results, lses), torch.stack(lses).logsumexp(0)), exact, inputs)


@BACKENDS
@HEADS
@pytest.mark.parametrize("bidirectional", [True, False])
def test_matching_and_cost_rows_in_parts(backend, heads, bidirectional):
    q, k = (tensor.detach() for tensor in tensors(2))
    common: dict[str, Any] = {"heads": heads, "bidirectional": bidirectional, "source": 1}
    part: dict[str, Any] = {"backend": backend, **common}
    targets, tokens = [3, 0], [4, 10, 3]
    exact = ops.match(q, k, GRID, targets=targets, refine=1, backend="reference", **common)
    rows = ops.cost_rows(q, k, GRID, tokens, backend="reference", **common)
    chosen = [3, 1, 0]
    kept = torch.cat([q[:, :, GRID.frame_slice(frame)] for frame in chosen], 2)
    assert_same(
        tuple(ops.match(kept, k, GRID, targets=targets, refine=1, query_frames=chosen, **part)), tuple(exact), ()
    )
    held = (17, 26)
    if bidirectional:
        with pytest.raises(ValueError, match="bidirectional=True needs the queries of all of frame 3"):
            ops.match(video_tokens(q, held), k, GRID, targets=targets, queries=held, **part)
        with pytest.raises(ValueError, match="bidirectional=True needs the queries of all of frame 0"):
            ops.cost_rows(video_tokens(q, held), k, GRID, tokens, queries=held, **part)
    else:
        found = ops.match(video_tokens(q, held), k, GRID, targets=targets, refine=1, queries=held, **part)
        assert_same(found.xy, exact.xy.flatten(-3, -2)[..., 2:11, :], ())
        assert_same(found.score, exact.score.flatten(-2)[..., 2:11], ())
        assert_same(ops.cost_rows(video_tokens(q, held), k, GRID, tokens, queries=held, **part), rows, ())
        with pytest.raises(ValueError, match=r"token 12 is outside what q holds of the source frame, .* from 2 to 10"):
            ops.cost_rows(video_tokens(q, (17, 26)), k, GRID, [12], queries=held, **part)
    with pytest.raises(ValueError, match=r"q holds no query of the source frame 1; it holds frames \[0\]"):
        ops.match(video_tokens(q, (0, 15)), k, GRID, targets=targets, queries=(0, 15), **part)
    for held in [(7, 52), (20, 40)]:
        mask = removed_outside(held)
        exact = ops.match(q, k, GRID, targets=targets, refine=1, key_mask=mask, backend="reference", **common)
        rows = ops.cost_rows(q, k, GRID, tokens, key_mask=mask, backend="reference", **common)
        shard = video_tokens(k, held)
        assert_same(tuple(ops.match(q, shard, GRID, targets=targets, refine=1, keys=held, **part)), tuple(exact), ())
        assert_same(ops.cost_rows(q, shard, GRID, tokens, keys=held, **part), rows, ())


@BACKENDS
@HEADS
def test_attention_mass_in_parts(backend, heads):
    q, k = (tensor.detach() for tensor in tensors(2))
    tokens = [4, 9, 2]
    common: dict[str, Any] = {"heads": heads, "source": 1}
    exact = tuple(ops.attention_mass(q, k, GRID, tokens, backend="reference", **common))
    held = (17, 26)
    found = ops.attention_mass(video_tokens(q, held), k, GRID, tokens, queries=held, backend=backend, **common)
    assert_same(tuple(found), exact, ())
    mask = some_mask()
    for held in [(7, 52), (20, 40)]:
        alone = ops.attention_mass(
            q, k, GRID, tokens, key_mask=removed_outside(held, mask), backend="reference", **common
        )
        found = ops.attention_mass(
            q, video_tokens(k, held), GRID, tokens, keys=held, key_mask=mask, backend=backend, **common
        )
        assert_same(tuple(found), tuple(alone), ())
        kept = removed_outside(held)
        kept[:, GRID.text_slice] = True
        with_text = torch.cat((k[:, :, GRID.text_slice], video_tokens(k, held)), 2)
        alone = ops.attention_mass(q, k, GRID, tokens, key_mask=kept & mask, backend="reference", **common)
        found = ops.attention_mass(q, with_text, GRID, tokens, keys=held, key_mask=mask, backend=backend, **common)
        assert_same(tuple(found), tuple(alone), ())


OPERATIONS: dict[str, Callable[..., Any]] = {
    "soft": lambda q, k, v, **options: ops.soft_displacement(q, k, GRID, **options),
    "windowed": lambda q, k, v, **options: ops.soft_displacement(q, k, GRID, window=1, **options),
    "hard": lambda q, k, v, **options: ops.hard_displacement(q, k, GRID, **options),
    "match": lambda q, k, v, **options: tuple(ops.match(q, k, GRID, refine=1, **options)),
    "rows": lambda q, k, v, **options: ops.cost_rows(q, k, GRID, [3, 1], **options),
    "mass": lambda q, k, v, **options: tuple(ops.attention_mass(q, k, GRID, [3, 1], **options)),
    "local": lambda q, k, v, **options: ops.frame_local_attention(q, k, v, GRID, **options),
}


@BACKENDS
@HEADS
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_fewer_key_heads_are_the_same_heads_repeated(backend, heads, operation, key_heads):
    q, k, v = inputs = tensors(3, key_heads=key_heads)
    options: dict[str, Any] = {} if operation == "local" else {"heads": heads}
    if options and heads != "none":
        options["head_weights"] = [1.0, 4.0, 2.0, 3.0]
    repeated = [tensor.repeat_interleave(4 // key_heads, 1) for tensor in (k, v)]
    exact = OPERATIONS[operation](q, *repeated, backend="reference", **options)
    wanted = (q, k, v) if operation == "local" else (q, k)
    assert_same(OPERATIONS[operation](*inputs, backend=backend, **options), exact, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@HEADS
def test_parts_in_half_precision_are_off_by_its_rounding(dtype, heads):
    """Gradients of shared key heads are summed before they are rounded."""
    q, k = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors(2, key_heads=1))
    held = (7, 52)
    results = []
    for inputs, backend in (((q.double(), k.double()), "reference"), ((q, k), "streaming")):
        q_part, k_part = (video_tokens(tensor, held).detach().requires_grad_() for tensor in inputs)
        moved = ops.soft_displacement(q_part, k_part, GRID, queries=held, keys=held, heads=heads, backend=backend)
        weights = torch.randn(moved.shape, generator=torch.Generator().manual_seed(9)).to(moved.dtype)
        results.append((moved, *torch.autograd.grad((moved * weights).sum(), (q_part, k_part))))
    steps = (2e-6, *[torch.finfo(dtype).eps + 2e-6] * 2)
    for exact, rounded, step in zip(*results, steps, strict=True):
        assert (exact - rounded.double()).abs().max() <= step * exact.abs().max()


@st.composite
def parts(draw: st.DrawFn) -> tuple[TokenGrid, tuple[int, int], tuple[int, int], dict[str, Any]]:
    grid = TokenGrid(
        draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6)), text_tokens=draw(st.integers(0, 3)),
        text_first=draw(st.booleans()),
    )  # fmt: skip
    ranges = []
    for _ in range(2):
        start = draw(st.integers(0, grid.video_tokens - 1))
        ranges.append((start, draw(st.integers(start + 1, grid.video_tokens))))
    options: dict[str, Any] = {
        "heads": draw(st.sampled_from(["logits", "features", "probabilities", "none"])),
        "window": draw(st.none() | st.integers(0, 3)),
        "memory_budget": draw(st.sampled_from([None, 150_000])),
    }
    if draw(st.booleans()):
        options["key_mask"] = some_mask(grid)
    return grid, ranges[0], ranges[1], options


@thorough
@given(parts())
def test_queries_and_keys_of_any_ranges(drawn):
    grid, queries, keys, options = drawn
    q, k = tensors(2, grid)
    whole = {**options, "memory_budget": None, "key_mask": removed_outside(keys, options.get("key_mask"), grid)}
    exact = ops.soft_displacement(q, k, grid, backend="reference", **whole)
    found = ops.soft_displacement(
        video_tokens(q, queries, grid), video_tokens(k, keys, grid), grid, queries=queries, keys=keys,
        backend="streaming", **options,
    )  # fmt: skip
    assert_same(found, rows_of_range(exact, queries, heads=options["heads"]), (q, k))


@BACKENDS
def test_the_log_sum_exp_is_that_of_the_logits(backend):
    q, k = tensors(2, key_heads=4)
    _, lse = ops.soft_displacement(
        q, k, GRID, heads="none", temperature=1.5, scale=0.3, return_lse=True, backend=backend
    )
    logits = 0.45 * q[:, :, GRID.frame_slice(1)] @ k[:, :, GRID.frame_slice(3)].transpose(2, 3)
    torch.testing.assert_close(lse[:, :, 1, 3].flatten(2), logits.logsumexp(-1))
    single = [tensor.float() for tensor in (q, k)]
    assert ops.soft_displacement(*single, GRID, return_lse=True, backend=backend)[1].dtype == torch.float32


def test_gradients_through_the_log_sum_exp_are_finite_differences():
    grid = TokenGrid(2, 2, 2)
    q, k, v = (tensor[:1, :1, :, :2].detach().clone().requires_grad_() for tensor in tensors(3, grid))

    def moved(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return ops.soft_displacement(q, k, grid, return_lse=True, backend="streaming")

    def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.frame_local_attention(q, k, v, grid, return_lse=True, backend="streaming")

    assert torch.autograd.gradcheck(moved, (q, k))
    assert torch.autograd.gradcheck(attended, (q, k, v))
