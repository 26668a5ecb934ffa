"""The matrices whose products are the score maps: key heads * D wide for heads="logits", D wide otherwise."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor

from corrdit.problem import PairProblem, working_dtype


class HeadProducts:
    """How the head axes of q and k enter the score maps.

    Query head h reads key head h // share. The mean over heads of q_h.k_h is a single product of the concatenated key
    heads, so heads="logits" has one map of their width whatever H is; "features" has one of width D, between weighted
    means over heads; every other reduction needs a map of width D for each query head.

    Attributes:
        dtype: type of scores, statistics and sums.
        maps: score maps of a batch entry.
        width: length of the products.
        copied_width: numbers read for each token of a map.
        averaged: whether the maps of a batch entry are averaged after their softmax.
        map_weights: what each map counts for in that average; all 1 without it.
        map_groups: the maps that read the same keys.
    """

    def __init__(self, q: Tensor, k: Tensor, problem: PairProblem) -> None:
        head_count, head_dim = q.shape[1], q.shape[3]
        self.dtype = working_dtype(q.dtype)
        self.heads = problem.heads
        self._share = head_count // k.shape[1]
        joined = problem.heads in ("logits", "features")
        self.maps = 1 if joined else head_count
        self.width = k.shape[1] * head_dim if problem.heads == "logits" else head_dim
        self.copied_width = head_count * head_dim if joined else head_dim
        self.averaged = problem.heads == "probabilities"
        self.map_weights = [1.0] * self.maps
        if self.averaged and problem.weights is not None:
            self.map_weights = problem.weights.tolist()
        step = 1 if joined else self._share
        self.map_groups = [range(first, first + step) for first in range(0, self.maps, step)]
        self._query_weights: Tensor | None = None
        self._key_weights: Tensor | None = None
        if joined:
            assert problem.weights is not None
            self._query_weights = problem.weights.to(device=q.device, dtype=self.dtype)
            self._key_weights = self._query_weights.view(k.shape[1], self._share).sum(1)

    @property
    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def query_heads(self, tensor: Tensor, index: int) -> Tensor:
        """The heads `[H or 1, N, D]` of q that map `index` is made of, from all heads `[H, N, D]` of a batch entry."""
        return tensor if self._query_weights is not None else tensor[index : index + 1]

    def key_heads(self, tensor: Tensor, index: int) -> Tensor:
        """The same of k."""
        if self._query_weights is not None:
            return tensor
        head = index // self._share
        return tensor[head : head + 1]

    def queries(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of query tokens `[H or 1, ..., D]`, weighted by head for heads="logits"."""
        if self.heads == "features":
            return self._mean(tokens, self._query_weights)
        if self.heads == "none" or self.averaged:
            return self._matrix(tokens)
        by_token = rearrange(tokens, "head ... width -> ... head width")
        matrix = torch.empty(by_token.shape, dtype=self.dtype, device=tokens.device)
        assert self._query_weights is not None
        torch.mul(by_token, self._query_weights.unsqueeze(-1), out=matrix)
        if self._share > 1:
            matrix = reduce(matrix, "... (key_head share) width -> ... key_head width", "sum", share=self._share)
        return matrix.view(-1, self.width)

    def keys(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of key tokens `[Hk or 1, ..., D]`; a view where the layout allows."""
        if self.heads == "features":
            return self._mean(tokens, self._key_weights)
        if self.heads == "logits":
            tokens = rearrange(tokens, "head ... width -> ... head width")
        return self._matrix(tokens)

    def _mean(self, tokens: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        return (weights @ tokens.reshape(len(tokens), -1).to(self.dtype)).view(-1, self.width)

    def _matrix(self, tokens: Tensor) -> Tensor:
        matrix = tokens.reshape(-1, self.width).to(self.dtype)
        return matrix if matrix.stride(-1) == 1 else matrix.contiguous()

    def add_query_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds `[n, width]` to the view `[H or 1, ..., D]` of a gradient that has the working dtype."""
        _, *places, head_dim = total.shape
        if self.heads != "logits":
            by_head = gradient.view(1, *places, head_dim)
        else:
            by_head = rearrange(gradient.view(*places, -1, head_dim), "... head width -> head ... width")
            by_head = by_head.repeat_interleave(self._share, 0) if self._share > 1 else by_head
        if self._query_weights is None:
            total.add_(by_head)
        else:
            total.addcmul_(by_head, self._query_weights.view(-1, *[1] * (total.ndim - 1)))

    def store_key_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Writes `[n, width]` over the view `[Hk or 1, n, D]` of a gradient of any dtype."""
        _, count, head_dim = total.shape
        if self.heads == "features":
            assert self._key_weights is not None
            torch.mul(gradient.view(1, count, head_dim), self._key_weights.view(-1, 1, 1), out=total)
        else:
            total.copy_(rearrange(gradient, "token (head width) -> head token width", width=head_dim))
