"""The matrices whose products are the score maps: of width H*D for heads="logits", of width D a head otherwise."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from corrdit.streaming.budget import working_dtype


class HeadProducts:
    """How the head axis of q and k enters the score maps.

    The mean over heads of q_h.k_h is a single product of the concatenated heads, so heads="logits" has one map of
    width H*D whatever H is; every other reduction needs a map of width D for each head.

    Attributes:
        dtype: type of scores, statistics and sums.
        maps: score maps of a batch entry.
        width: length of the products.
        map_weights: what each map counts for in the mean of maps; all 1 where maps are not averaged.
    """

    def __init__(self, q: Tensor, heads: str, weights: Tensor | None) -> None:
        head_count, head_dim = q.shape[1], q.shape[3]
        self.dtype = working_dtype(q.dtype)
        self.folded = heads == "logits"
        self.maps = 1 if self.folded else head_count
        self.width = head_count * head_dim if self.folded else head_dim
        self.averaged = heads == "probabilities"
        self.map_weights = [1.0] * self.maps
        if weights is not None and self.averaged:
            self.map_weights = weights.tolist()
        self._fold_weights: Tensor | None = None
        if weights is not None and self.folded:
            self._fold_weights = weights.to(device=q.device, dtype=self.dtype).unsqueeze(-1)

    @property
    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def heads_of(self, tensor: Tensor, index: int) -> Tensor:
        """The heads `[H or 1, N, D]` that map `index` is made of, from all heads `[H, N, D]` of a batch entry."""
        return tensor if self.folded else tensor[index : index + 1]

    def queries(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of query tokens `[H or 1, ..., D]`, weighted by head for heads="logits"."""
        if self._fold_weights is None:
            return self.keys(tokens)
        by_token = rearrange(tokens, "head ... width -> ... head width")
        matrix = torch.empty(by_token.shape, dtype=self.dtype, device=tokens.device)
        torch.mul(by_token, self._fold_weights, out=matrix)
        return matrix.view(-1, self.width)

    def keys(self, tokens: Tensor) -> Tensor:
        """`[n, width]` of key tokens `[H or 1, ..., D]`; a view where the layout allows."""
        by_token = rearrange(tokens, "head ... width -> ... head width") if self.folded else tokens
        matrix = by_token.reshape(-1, self.width).to(self.dtype)
        return matrix if matrix.stride(-1) == 1 else matrix.contiguous()

    def add_query_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Adds `[n, width]` to the view `[H or 1, ..., D]` of a gradient that has the working dtype."""
        by_head = self._by_head(total, gradient) if self.folded else gradient.view(total.shape)
        if self._fold_weights is None:
            total.add_(by_head)
        else:
            total.addcmul_(by_head, self._fold_weights.view(-1, *[1] * (total.ndim - 1)))

    def store_key_gradient(self, total: Tensor, gradient: Tensor) -> None:
        """Writes `[n, width]` over the view `[H or 1, ..., D]` of a gradient of any dtype."""
        total.copy_(self._by_head(total, gradient))

    @staticmethod
    def _by_head(total: Tensor, gradient: Tensor) -> Tensor:
        head_count, *places, head_dim = total.shape
        return rearrange(gradient.view(*places, head_count, head_dim), "... head width -> head ... width")
