"""The attention of perturbed layers: golden numbers, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.guidance import perturbations
from corrdit.integrations.diffusers.guidance.perturbations import SubstituteAttention, frame_local, identity_attention
from corrdit.integrations.diffusers.host.attention import intercepting


def substituted(*arguments: Any) -> intercepting:
    return intercepting([SubstituteAttention(*arguments)])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [0, 1])
def test_both_variants_equal_the_released_code(
    golden: Callable[[str], dict[str, np.ndarray]], case: int, backend: str
) -> None:
    numbers = golden("cag_attention")
    batch, heads, head_dim, frames, tokens, text, seed = (int(value) for value in numbers[f"{case}_meta"])
    shape = (batch, heads, text + frames * tokens, head_dim)
    q, k, v = (
        torch.from_numpy(np.random.default_rng(seed + offset).standard_normal(shape, dtype=np.float32))
        for offset in (0, 100, 200)
    )
    grid = TokenGrid(frames, 1, tokens, text_tokens=text, text_first=True)
    for name, renormalize in (("renormalized", True), ("zeroed", False)):
        with substituted(frame_local(renormalize=renormalize, span=0, backend=backend), grid, None):
            output = F.scaled_dot_product_attention(2 * q, 2 * k, v)
        expected = torch.from_numpy(numbers[f"{case}_{name}"])
        assert (output - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("text_first", [True, False])
def test_identity_attention_sees_itself_and_unmasked_text(text_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbations, "LOGITS_AT_ONCE", 40)  # several pieces
    grid = TokenGrid(2, 2, 3, text_tokens=4, text_first=text_first)
    q, k, v = (torch.randn(2, 3, grid.tokens, 8, dtype=torch.float64) for _ in range(3))
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[0, grid.text_slice] = torch.tensor([True, True, False, True])
    is_text = torch.zeros(grid.tokens, dtype=torch.bool)
    is_text[grid.text_slice] = True
    seen = torch.eye(grid.tokens, dtype=torch.bool) | is_text[:, None] | is_text[None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen & key_mask[:, None, None, :], scale=0.7)
    torch.testing.assert_close(identity_attention(q, k, v, grid, scale=0.7, key_mask=key_mask), expected)


def test_identity_attention_without_text_is_the_values() -> None:
    grid = TokenGrid(2, 2, 2)
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    output = identity_attention(q, k, v, grid, scale=0.5, key_mask=None)
    assert torch.equal(output, v)
    assert output.data_ptr() != v.data_ptr()


def test_other_heads_and_grouped_keys_keep_full_attention() -> None:
    grid = TokenGrid(2, 2, 2)
    q = torch.randn(1, 4, 8, 4)
    k, v = torch.randn(2, 1, 2, 8, 4)
    full = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    local = torch.cat(
        [
            F.scaled_dot_product_attention(q[:, :, part], k[:, :, part], v[:, :, part], enable_gqa=True)
            for part in (slice(0, 4), slice(4, 8))
        ],
        dim=2,
    )
    with substituted(frame_local(renormalize=True, span=0, backend="reference"), grid, (1, 3)):
        output = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(output[:, [1, 3]], local[:, [1, 3]])
    torch.testing.assert_close(output[:, [0, 2]], full[:, [0, 2]])


@pytest.mark.parametrize("mask_heads", [1, 4])
def test_attention_that_is_replaced_is_not_computed(mask_heads: int) -> None:
    grid = TokenGrid(2, 2, 2)
    q, k, v = torch.randn(3, 1, 4, 8, 4)
    mask = torch.ones(1, mask_heads, 1, 8, dtype=torch.bool)
    mask[..., 3] = False
    computed: list[int] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                computed.append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    def values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **further: Any) -> torch.Tensor:
        return v

    with Count(), substituted(values, grid, (1, 3)):
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert computed == [2]
    assert torch.equal(output[:, [1, 3]], v[:, [1, 3]])
    torch.testing.assert_close(
        output[:, [0, 2]], F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 4, 8, 8))[:, [0, 2]]
    )
    with Count(), substituted(values, grid, (0, 1, 2, 3)):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), v)
    assert computed == [2]


@pytest.mark.parametrize("change", [{"is_causal": True}, {"attn_mask": torch.ones(8, 8, dtype=torch.bool).tril()}])
def test_attention_that_is_not_full_is_refused(change: dict[str, object]) -> None:
    q = torch.randn(1, 2, 8, 4)
    with (
        substituted(identity_attention, TokenGrid(2, 2, 2), None),
        pytest.raises(ValueError, match="causal"),
    ):
        F.scaled_dot_product_attention(q, q, q, **change)  # type: ignore[arg-type]
    with (
        substituted(identity_attention, TokenGrid(2, 2, 1), None),
        pytest.raises(ValueError, match="8 queries and 8 keys"),
    ):
        F.scaled_dot_product_attention(q, q, q)
