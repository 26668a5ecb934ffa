"""The matrices whose products are the score maps: H*D wide for heads="logits", D wide otherwise."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from corrdit.streaming.budget import working_dtype


class HeadProducts:
    """How the head axis of q and k enters the score maps.

    The mean over heads of q_h.k_h is a single product of the concatenated heads, so heads="logits" has one map of
    width H*D whatever H is; "features" has one of width D, between weighted means over heads; every other reduction
    needs a map of width D for each head.

    Attributes:
        dtype: type of scores, statistics and sums.
        maps: score maps of a batch entry.
        width: length of the products.
        copied_width: numbers read for each token of a map.
        averaged: whether the maps of a batch entry are averaged after their softmax.
        map_weights: what each map counts for in that average; all 1 without it.
    """

    def __init__(self, q: Tensor, heads: str, weights: Tensor | None) -> None:
        head_count, head_dim = q.shape[1], q.shape[3]
        self.dtype = working_dtype(q.dtype)
        self.heads = heads
        joined = heads in ("logits", "features")
        self.maps = 1 if joined else head_count
        self.width = head_count * head_dim if heads == "logits" else head_dim
        self.copied_width = head_count * head_dim if joined else head_dim
        self.averaged = heads == "probabilities"
        self.map_weights = [1.0] * self.maps
        if self.averaged and weights is not None:
            self.map_weights = weights.tolist()
        self._head_weights: Tensor | None = None
        if joined:
            assert weights is not None
            self._head_weights = weights.to(device=q.device, dtype=self.dtype)

    @property
    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def heads_of(self, tensor: Tensor, index: int) -> Tensor:
        """The heads `[H or 1, N, D]` that map `index` is made of, from all heads `[H, N, D]` of a batch entry."""
        return tensor if self._head_weights is not None else tensor[index : index + 1]

    def queries(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of query tokens `[H or 1, ..., D]`, weighted by head for heads="logits"."""
        if self.heads != "logits":
            return self.keys(tokens)
        by_token = rearrange(tokens, "head ... width -> ... head width")
        matrix = torch.empty(by_token.shape, dtype=self.dtype, device=tokens.device)
        assert self._head_weights is not None
        torch.mul(by_token, self._head_weights.unsqueeze(-1), out=matrix)
        return matrix.view(-1, self.width)

    def keys(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of key tokens `[H or 1, ..., D]`; a view where the layout allows."""
        if self.heads == "features":
            assert self._head_weights is not None
            return (self._head_weights @ tokens.reshape(len(tokens), -1).to(self.dtype)).view(-1, self.width)
        by_token = rearrange(tokens, "head ... width -> ... head width") if self.heads == "logits" else tokens
        matrix = by_token.reshape(-1, self.width).to(self.dtype)
        return matrix if matrix.stride(-1) == 1 else matrix.contiguous()

    def add_query_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds `[n, width]` to the view `[H or 1, ..., D]` of a gradient that has the working dtype."""
        by_head = self._by_head(total, gradient)
        if self._head_weights is None:
            total.add_(by_head)
        else:
            total.addcmul_(by_head, self._weights_for(total))

    def store_key_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Writes `[n, width]` over the view `[H or 1, ..., D]` of a gradient of any dtype."""
        by_head = self._by_head(total, gradient)
        if self.heads == "features":
            torch.mul(by_head, self._weights_for(total), out=total)
        else:
            total.copy_(by_head)

    def _weights_for(self, tensor: Tensor) -> Tensor:
        """The head weights `[H, 1, ..., 1]`, one axis for each of the tensor's."""
        assert self._head_weights is not None
        return self._head_weights.view(-1, *[1] * (tensor.ndim - 1))

    def _by_head(self, total: Tensor, gradient: Tensor) -> Tensor:
        """`[n, width]` in the shape of `total`, with a head axis of 1 where all heads get the same."""
        head_count, *places, head_dim = total.shape
        if self.heads != "logits":
            return gradient.view(1, *places, head_dim)
        return rearrange(gradient.view(*places, head_count, head_dim), "... head width -> head ... width")
