"""An attention backend that is none of torch's: attention written out, under the name of one that is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

PLAIN_BACKEND = AttentionBackendName.XFORMERS
"""The name under which it stands in, unless another is wanted."""


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of `[B, N, H, D]` with a mask `[B, M]` or `[B, H, N, M]`; a query without any key gives 0."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * factor
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 4 else attn_mask[:, None, None]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).nan_to_num(0), value)


@contextlib.contextmanager
def plain_backend(name: AttentionBackendName = PLAIN_BACKEND) -> Iterator[AttentionBackendName]:
    """Inside, `plain_attention` is diffusers' attention backend of this name."""
    arguments = {"query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale"}
    registry = _AttentionBackendRegistry
    with (
        mock.patch.dict(registry._backends, {name: plain_attention}),
        mock.patch.dict(registry._supported_arg_names, {name: arguments}),
        mock.patch.dict(registry._constraints, {name: []}),
    ):
        yield name


@contextlib.contextmanager
def plain_assigned() -> Iterator[None]:
    """Inside, `plain_attention` stands in place of torch's function, whose tensors are `[B, H, N, D]`."""

    def assigned(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any
    ) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return plain_attention(q, k, v, *args, **kwargs).transpose(1, 2)

    with mock.patch.object(F, "scaled_dot_product_attention", assigned):
        yield


def use_backend(transformer: torch.nn.Module, name: AttentionBackendName) -> int:
    """Sets the backend of this model's processors alone, and counts them.

    `set_attention_backend` changes that of every other model in the process, too.
    """
    chosen: list[Any] = [part.processor for part in transformer.modules() if hasattr(part, "processor")]
    chosen = [processor for processor in chosen if hasattr(processor, "_attention_backend")]
    for processor in chosen:
        processor._attention_backend = name
    return len(chosen)
