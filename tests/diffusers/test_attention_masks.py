"""What an attention mask says about keys."""

from __future__ import annotations

import pytest
import torch

from corrdit.integrations.diffusers.attention_inputs import key_mask_of

VALID = torch.tensor([[True, True, True, False], [True, False, True, True]])


def test_no_mask():
    assert key_mask_of(None, 2, 4) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("removed", [-10000.0, -torch.inf])
def test_masks_over_keys(dtype, removed):
    mask = VALID[:, None, None, :]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, removed)
    assert torch.equal(key_mask_of(mask, 2, 4), VALID)


def test_masks_that_also_remove_queries_or_repeat_over_heads_and_queries():
    between = VALID[:, None, :, None] & VALID[:, None, None, :]
    assert torch.equal(key_mask_of(between, 2, 4), VALID)
    assert torch.equal(key_mask_of(VALID[:, None, None, :].expand(2, 3, 4, 4), 2, 4), VALID)


def test_one_mask_for_the_whole_batch():
    assert torch.equal(key_mask_of(VALID[:1, None, None, :], 2, 4), VALID[:1].expand(2, 4))


@pytest.mark.parametrize("mask", [torch.ones(4, 4).tril().bool(), torch.eye(4).bool()[None, None]])
def test_masks_that_depend_on_the_query_are_refused(mask):
    with pytest.raises(ValueError, match="differs between queries or heads"):
        key_mask_of(mask, 2, 4)


def test_attention_bias_is_refused():
    with pytest.raises(ValueError, match="attention bias"):
        key_mask_of(torch.linspace(-1, 1, 4).expand(1, 1, 1, 4), 2, 4)
