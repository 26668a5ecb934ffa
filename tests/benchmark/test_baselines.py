"""The baselines compute the same functions."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from corrdit import TokenGrid, ops
from corrdit.benchmark import comparisons
from corrdit.benchmark.baselines import compiled, folded_chunks, materialized, sdpa, window_gather


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(3, 4, 5)
    return grid, *(torch.randn(2, 3, grid.tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.fixture
def uncompiled(monkeypatch):
    """The functions that would be compiled, as they are: compilers take seconds and are not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    caches = (
        compiled._compiled_reference, compiled._compiled_chunk, compiled._compiled_flex_attention,
        compiled._same_frame_mask,
    )  # fmt: skip
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("baseline", "options"),
    [
        (materialized.soft_displacement, {}),
        (folded_chunks.soft_displacement, {}),
        (sdpa.soft_displacement, {}),
        (lambda *given, **o: sdpa.soft_displacement(*given, heads="probabilities", **o),
         {"heads": "probabilities"}),
        (lambda *given, **o: window_gather.soft_displacement(*given, window=1, **o), {"window": 1}),
    ],
    ids=["materialized", "folded", "attention, logits", "attention, probabilities", "windows"],
)  # fmt: skip
def test_baselines_of_soft_displacement(tensors, baseline, options):
    grid, q, k, _ = tensors
    expected = ops.soft_displacement(q, k, grid, temperature=2.0, backend="reference", **options)
    torch.testing.assert_close(baseline(q, k, grid, temperature=2.0).to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("baseline", [materialized.hard_displacement, folded_chunks.hard_displacement])
def test_baselines_of_hard_displacement(tensors, baseline):
    grid, q, k, _ = tensors
    assert torch.equal(baseline(q, k, grid), ops.hard_displacement(q, k, grid))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_baseline_of_matching(tensors, bidirectional):
    grid, q, k, _ = tensors
    found = materialized.match(q, k, grid, source=1, bidirectional=bidirectional)
    expected = ops.match(q, k, grid, source=1, bidirectional=bidirectional)
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours)


def test_baselines_of_chosen_rows(tensors):
    grid, q, k, _ = tensors
    tokens = torch.tensor([0, 7, 19])
    torch.testing.assert_close(
        materialized.cost_rows(q, k, grid, tokens, source=2), ops.cost_rows(q, k, grid, tokens, source=2)
    )
    for with_text in (grid, TokenGrid(2, 4, 5, text_tokens=20), TokenGrid(2, 4, 5, text_tokens=20, text_first=False)):
        found = materialized.attention_mass(q, k, with_text, tokens)
        for theirs, ours in zip(found, ops.attention_mass(q, k, with_text, tokens), strict=True):
            torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text_tokens", [0, 20])
def test_baselines_of_frame_local_attention(tensors, text_tokens, text_first):
    _, q, k, v = tensors
    grid = TokenGrid(3 - text_tokens // 20, 4, 5, text_tokens=text_tokens, text_first=text_first)
    masked, zeroed = (ops.frame_local_attention(q, k, v, grid, renormalize=before) for before in (True, False))
    torch.testing.assert_close(materialized.frame_local_attention(q, k, v, grid), masked)
    torch.testing.assert_close(materialized.frame_local_attention(q, k, v, grid, renormalize=False), zeroed)
    torch.testing.assert_close(sdpa.frame_local_attention(q, k, v, grid), masked)


@pytest.mark.usefixtures("uncompiled")
def test_what_is_compiled(tensors):
    grid, q, k, v = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    tokens = torch.tensor([0, 7, 19])
    for options in ({}, {"heads": "probabilities"}, {"window": 1}):
        torch.testing.assert_close(
            compiled.soft_displacement(q, k, grid, **options), ops.soft_displacement(q, k, grid, **options)
        )
    torch.testing.assert_close(
        compiled.folded_soft_displacement(q, k, grid, mode="default"), ops.soft_displacement(q, k, grid)
    )
    assert torch.equal(compiled.hard_displacement(q, k, grid), ops.hard_displacement(q, k, grid))
    for bidirectional in (True, False):
        found = compiled.match(q, k, grid, bidirectional=bidirectional)
        for theirs, ours in zip(found, ops.match(q, k, grid, bidirectional=bidirectional), strict=True):
            torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(compiled.cost_rows(q, k, grid, tokens), ops.cost_rows(q, k, grid, tokens))
    for theirs, ours in zip(
        compiled.attention_mass(q, k, grid, tokens), ops.attention_mass(q, k, grid, tokens), strict=True
    ):
        torch.testing.assert_close(theirs, ours)
    with_text = TokenGrid(2, 4, 5, text_tokens=20)
    for before in (True, False):
        torch.testing.assert_close(
            compiled.frame_local_attention(q, k, v, with_text, renormalize=before),
            ops.frame_local_attention(q, k, v, with_text, renormalize=before),
        )


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
def test_flex_attention(tensors):
    grid, q, k, v = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    expected = ops.soft_displacement(q, k, grid, heads="probabilities", temperature=2.0)
    found = compiled.flex_soft_displacement(q, k, grid, temperature=2.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with_text = TokenGrid(2, 4, 5, text_tokens=20)
    q, k, v = (torch.cat((tensor, tensor), dim=-1) for tensor in (q, k, v))  # a head is at least 16 wide
    for before in (True, False):
        torch.testing.assert_close(
            compiled.flex_frame_local_attention(q, k, v, with_text, renormalize=before),
            ops.frame_local_attention(q, k, v, with_text, renormalize=before),
            rtol=1e-4,
            atol=1e-5,
        )


def test_one_kernel_of_scaled_dot_product_attention(tensors, monkeypatch):
    grid, q, k, v = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    expected = ops.soft_displacement(q, k, grid, heads="probabilities", temperature=2.0)
    allowed = []
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda backend: allowed.append(backend) or sdpa_kernel(backend))
    flash = sdpa.only(SDPBackend.FLASH_ATTENTION)
    found = sdpa.soft_displacement(q, k, grid, heads="probabilities", temperature=2.0, attend=flash)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sdpa.frame_local_attention(q, k, v, grid, attend=flash), ops.frame_local_attention(q, k, v, grid)
    )
    assert set(allowed) == {SDPBackend.FLASH_ATTENTION}
    with pytest.raises(RuntimeError):
        sdpa.frame_local_attention(q, k, v, grid, attend=sdpa.only(SDPBackend.CUDNN_ATTENTION))


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attention_3_is_asked_in_its_own_order(tensors, monkeypatch, with_sums):
    """What stands for its package has its signature: `[B, N, H, D]`, and in early releases a pair as the result."""
    grid, q, k, v = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    package = ModuleType("flash_attn_interface")

    def flash_attn_func(q, k, v, softmax_scale=None):
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), scale=softmax_scale
        ).transpose(1, 2)
        return (attended, None) if with_sums else attended

    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    expected = ops.soft_displacement(q, k, grid, heads="probabilities")
    found = sdpa.soft_displacement(q, k, grid, heads="probabilities", attend=sdpa.flash_attention_3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        sdpa.frame_local_attention(q, k, v, grid, attend=sdpa.flash_attention_3),
        ops.frame_local_attention(q, k, v, grid),
    )


@pytest.mark.usefixtures("uncompiled")
def test_flex_attention_is_told_to_take_flash_kernels(tensors, monkeypatch):
    grid, q, k, v = (tensors[0], *(torch.cat((t, t), -1).float() for t in tensors[1:]))
    seen = []

    def attention(q, k, v, scale=None, block_mask=None, kernel_options=None):
        seen.append((v.shape[-1], kernel_options))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    monkeypatch.setattr(compiled, "_compiled_flex_attention", lambda: attention)
    expected = ops.soft_displacement(q, k, grid, heads="probabilities")
    found = compiled.flex_soft_displacement(q, k, grid, options=compiled.FLASH)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    compiled.flex_frame_local_attention(q, k, v, grid, options=compiled.FLASH)
    assert len(seen) == grid.frames + 1
    assert all(given == (q.shape[-1], {"BACKEND": "FLASH"}) for given in seen)


def test_why_a_way_is_missing(monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(compiled, "installed", lambda module: False)
    assert comparisons._flash_3_missing("cuda") == "flash_attn_interface is not installed"
    assert comparisons._flash_3_missing("cpu") == "does not run on cpu"
    monkeypatch.setattr(flex_attention, "FlexKernelOptions", type("Options", (), {"__annotations__": {"BACKEND": str}}))
    assert comparisons._flex_flash_missing("cuda") == "flash_attn.cute is not installed"
    monkeypatch.setattr(compiled, "installed", lambda module: True)
    assert comparisons._flex_flash_missing("cuda") is None
    assert comparisons._flash_3_missing("cuda") is None
    monkeypatch.setattr(flex_attention, "FlexKernelOptions", type("Options", (), {"__annotations__": {}}))
    assert "has no BACKEND" in comparisons._flex_flash_missing("cuda")
    monkeypatch.undo()
    assert compiled.installed("torch")
    assert not compiled.installed("no_such_package.part")


@pytest.mark.slow
def test_compiled_for_more_shapes_than_the_compiler_allows_by_itself():
    for width in range(2, 12):
        grid = TokenGrid(2, 2, width)
        q, k = (torch.randn(1, 2, grid.tokens, 8) for _ in range(2))
        torch.testing.assert_close(compiled.hard_displacement(q, k, grid), ops.hard_displacement(q, k, grid))


def test_the_library_kernel_is_named(tensors):
    grid, q, k, v = (tensors[0], *(tensor.float() for tensor in tensors[1:]))
    names = {"math", "flash", "efficient", "cudnn", "overrideable"}
    assert sdpa.displacement_kernel(q, k, grid, "logits") in names
    assert sdpa.frame_local_kernel(q, k, v, grid) in names
    with pytest.raises(ValueError, match='heads must be "logits" or "probabilities"'):
        sdpa.soft_displacement(q, k, grid, heads="none")
