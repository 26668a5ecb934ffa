"""What is refused: a ValueError or RuntimeError that names what was given, before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.streaming import budget

GRID = TokenGrid(3, 2, 3, text_tokens=2)
PLACES = torch.zeros(1, 3, 3, 2, 3, 2)


def tensors(count: int = 2, dtype: torch.dtype = torch.float32, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 2, GRID.tokens, width, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"heads": "mean"}, "heads must be one of logits, features, probabilities, none, got 'mean'"),
        ({"heads": None}, "heads must be one of"),
        ({"head_weights": 0.5}, "head_weights must be a list, got 0.5"),
        ({"head_weights": ["a", "b"]}, "head_weights must be a number, got 'a'"),
        ({"head_weights": [1j, 1]}, "head_weights must be a number"),
        ({"head_weights": [1, float("nan")]}, "head_weights must be finite, got nan"),
        ({"head_weights": [1.0, -1.0]}, "not negative"),
        ({"head_weights": [0, 0]}, "not all zero"),
        ({"head_weights": [1, 1, 1]}, r"one weight a head, \[2\], got \[3\]"),
        ({"head_weights": torch.ones(3)}, r"one real weight a head, \[2\], got \[3\]"),
        ({"head_weights": torch.tensor([1.0, -1.0])}, "not negative"),
        ({"head_weights": torch.tensor([1.0, float("inf")])}, "must be finite"),
        ({"head_weights": torch.zeros(2)}, "not all zero"),
        ({"head_weights": [1, 1], "heads": "none"}, "drop one of the two"),
        ({"temperature": 0}, "temperature must be finite and above 0"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"temperature": 1e308}, r"temperature must lie in 1e-18 to 1e\+18"),
        ({"scale": 1e-300}, "scale must lie in"),
        ({"scale": -1.0}, "scale must be finite and above 0"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"frames": []}, "frames is an empty list"),
        ({"frames": "all"}, "frames must be None, an int"),
        ({"frames": 1.0}, "frames given as a span must be a whole number"),
        ({"frames": -1}, "at least 0, got -1"),
        ({"frames": [(0, 3)]}, r"frame pair \(0, 3\) is outside the grid"),
        ({"frames": [(0, -1)]}, r"frame pair \(0, -1\) is outside the grid"),
        ({"frames": [(0, 1, 2)]}, r"got \(0, 1, 2\) in it"),
        ({"window": -1}, "window must be a whole number of at least 0"),
        ({"window": 1.0}, "window must be a whole number"),
        ({"center": PLACES}, "window is None"),
        ({"window": 1, "center": PLACES[:, 0]}, "center must be a tensor"),
        ({"window": 1, "center": PLACES / 0}, "center must be finite"),
        ({"window": 1, "center": PLACES.to(torch.complex64)}, "center must be real"),
        ({"key_mask": torch.ones(1, GRID.tokens)}, "key_mask must be a bool tensor"),
        ({"key_mask": torch.ones(1, GRID.video_tokens, dtype=torch.bool)}, r"key_mask must be .* = \[1, 20\]"),
        ({"key_mask": torch.ones(1, GRID.tokens, dtype=torch.bool, device="meta")}, "key_mask is on meta, q on cpu"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"memory_budget": 1e9}, "memory_budget"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, streaming, reference, got 'cuda'"),
    ],
    ids=str,
)
def test_options_of_displacement(options, names):
    for operation in (ops.soft_displacement, ops.hard_displacement):
        with pytest.raises(ValueError, match=names):
            operation(*tensors(), GRID, **options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"source": 3}, "source is frame 3, but the grid has frames 0 to 2"),
        ({"source": None}, "source must be a whole number"),
        ({"targets": []}, "targets is empty"),
        ({"targets": 1}, "targets must be a list, got 1"),
        ({"targets": torch.tensor(1)}, "targets must be a list"),
        ({"targets": [3]}, "targets is frame 3"),
        ({"targets": [1.0]}, "targets must be a whole number"),
        ({"refine": -1}, "refine must be a whole number"),
        ({"bidirectional": "no"}, "bidirectional must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_options_of_match(options, names):
    with pytest.raises(ValueError, match=names):
        ops.match(*tensors(), GRID, **options)


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (3, "tokens must be a list, got 3"),
        (None, "tokens must be a list, got None"),
        (torch.tensor(3), "1-D integer tensor"),
        ([], "tokens is an empty list"),
        (torch.tensor([1.0]), "1-D integer tensor of flat indices, got .* torch.float32"),
        ([1.0], "tokens must be a whole number"),
        (["a"], "tokens must be a whole number"),
        ([[1, 2]], "tokens must be a whole number"),
        ([6], "token 6 is outside the source frame, whose flat indices go from 0 to 5"),
        (torch.tensor([-1]), "token -1 is outside"),
        (torch.tensor([9], dtype=torch.uint16), "token 9 is outside"),
        ([10**30], "is outside the source frame"),
    ],
    ids=str,
)
def test_tokens_of_rows(tokens, names):
    for operation in (ops.cost_rows, ops.attention_mass):
        with pytest.raises(ValueError, match=names):
            operation(*tensors(), GRID, tokens)


def test_tensors_that_do_not_fit():
    q, k, v = tensors(3)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        (([1], k, GRID), "q must be a tensor"),
        ((q, None, GRID), "k must be a tensor"),
        ((q[0], k[0], GRID), r"\[batch, heads, tokens, head_dim\]"),
        ((q[:0], k[:0], GRID), "none empty"),
        ((q[:, :1], k, GRID), "same shape"),
        ((q, k.half(), GRID), "q and k must have the same dtype, got torch.float32 and torch.float16"),
        ((q, k.to("meta"), GRID), "k is on the meta device"),
        ((q.int(), k.int(), GRID), "must be float16, bfloat16, float32 or float64"),
        ((q, k, GRID.without_text()), r"q has 20 tokens, but the grid has 18 \(0 text \+ 3 frames x 2 x 3\)"),
        ((q, k, None), "grid must be a corrdit.TokenGrid"),
    ]
    for arguments, names in wrong:
        for operation in (ops.soft_displacement, ops.match):
            with pytest.raises(ValueError, match=names):
                operation(*arguments)
    for options, names in (({"renormalize": "after"}, "renormalize must be True or False"), ({"span": -1}, "span")):
        with pytest.raises(ValueError, match=names):
            ops.frame_local_attention(q, k, v, GRID, **options)
    with pytest.raises(ValueError, match="q and v must have the same shape"):
        ops.frame_local_attention(q, k, v[..., :2], GRID)
    with pytest.raises(ValueError, match=r"v must be a tensor \[batch, heads, tokens, head_dim\], got None"):
        ops.frame_local_attention(q, k, None, GRID)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text_first must be True or False, got 'last'"):
        TokenGrid(3, 2, 3, 2, text_first="last")  # type: ignore[arg-type]


def test_triton_by_name_is_never_another_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for operation in (ops.soft_displacement, ops.hard_displacement, ops.match):
        with pytest.raises(RuntimeError, match="the tensors are on cpu, the kernels need a CUDA device"):
            operation(*tensors(width=8), GRID, backend="triton")
        with pytest.raises(ValueError, match="not float64"):
            operation(*tensors(dtype=torch.float64, width=8), GRID, backend="triton")


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: triton is not installed; use'):
        ops.soft_displacement(*tensors(width=8), GRID, backend="triton")


def test_sizes_past_every_frame_are_the_whole_frame():
    q, k, v = tensors(3)
    huge = 10**30
    for backend in ("reference", "streaming"):
        options: dict[str, Any] = {"backend": backend}
        whole = ops.soft_displacement(q, k, GRID, **options)
        torch.testing.assert_close(ops.soft_displacement(q, k, GRID, window=huge, **options), whole)
        torch.testing.assert_close(ops.soft_displacement(q, k, GRID, frames=huge, **options), whole.flatten(1, 2))
        near, far = (ops.match(q, k, GRID, refine=refine, **options).xy for refine in (3, huge))
        assert torch.equal(near, far)
        near, far = (ops.frame_local_attention(q, k, v, GRID, span=span, **options) for span in (2, huge))
        assert torch.equal(near, far)


def test_numbers_of_other_libraries_are_taken():
    q, k = tensors()
    whole = ops.soft_displacement(q, k, GRID, frames=1)
    assert torch.equal(ops.soft_displacement(q, k, GRID, frames=torch.tensor(1)), whole)
    large = ops.soft_displacement(q, k, GRID, head_weights=torch.tensor([3e38, 1e38]))
    torch.testing.assert_close(large, ops.soft_displacement(q, k, GRID, head_weights=[0.75, 0.25]))
    rows = ops.cost_rows(q, k, GRID, torch.tensor([5, 0], dtype=torch.uint16))
    assert torch.equal(rows, ops.cost_rows(q, k, GRID, [5, 0]))


@pytest.mark.parametrize("heads", ["logits", "features", "probabilities", "none"])
def test_the_default_budget_grows_for_large_frames(monkeypatch, heads):
    # As 40 heads of 128 and 45 x 80 tokens do for the real default.
    monkeypatch.setattr(budget, "DEFAULT_MEMORY_BUDGET", 500)
    q, k, v = (tensor.requires_grad_() for tensor in tensors(3))
    options: dict[str, Any] = {"backend": "streaming", "heads": heads}
    for window in (None, 1):
        ops.soft_displacement(q, k, GRID, window=window, **options).sum().backward()
        ops.hard_displacement(q, k, GRID, window=window, **options)
    ops.match(q, k, GRID, **options)
    ops.cost_rows(q, k, GRID, [3], **options)
    ops.attention_mass(q, k, GRID, [3], **options)
    ops.frame_local_attention(q, k, v, GRID, backend="streaming").sum().backward()
    with pytest.raises(ValueError, match="memory_budget=500 bytes is too small"):
        ops.match(q, k, GRID, memory_budget=500, **options)
