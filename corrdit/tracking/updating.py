"""Query features that follow a point's looks along its track, where the track is trustworthy.

Source: HeFT, "Denoise to Track" (arXiv 2512.04619): the feature of a query is an exponential moving average over the
frames in which the point is found visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit import ops
from corrdit.geometry import bilinear_tokens
from corrdit.tracking.readings import Reading, TokenPair

Features = tuple[Tensor, Tensor]
"""Queries and keys `[H, P, D]` of P points, float32."""


class FeatureAverage:
    """What was seen of P points since their own frame.

    A chunk has features of their frame of its own, so the average is kept as the share of those and a rest.

    Args:
        rate: share of a new frame in the average, 0 to 1.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._kept: Tensor | None = None
        self._rest: Features | None = None

    def of(self, own: Features) -> Features:
        """The average, with the features a chunk has of the points in their own frame."""
        if self._kept is None or self._rest is None:
            return own
        return (self._kept * own[0] + self._rest[0], self._kept * own[1] + self._rest[1])

    def see(self, features: Features, trusted: Tensor) -> None:
        """Take in the features at the places found in a frame, for the points where `trusted [P]`."""
        rate = self._rate * trusted.to(features[0]).unsqueeze(1)
        if self._kept is None or self._rest is None:
            self._kept, self._rest = torch.ones_like(rate), (torch.zeros_like(features[0]),) * 2
        q, k = ((1 - rate) * rest + rate * seen for rest, seen in zip(self._rest, features, strict=True))
        self._kept, self._rest = (1 - rate) * self._kept, (q, k)


def features_at(pair: TokenPair, tokens: Tensor, frame: int) -> Features:
    """Queries and keys at places `[P, 2]` (x, y) in tokens of one frame of the pair, bilinear."""
    around, share = bilinear_tokens(tokens, (pair.grid.height, pair.grid.width))
    where, share = around.to(pair.q.device), share.to(pair.q.device)
    q, k = (
        (part[0, :, pair.grid.frame_slice(frame)].float()[:, where] * share.unsqueeze(-1)).sum(2)
        for part in (pair.q, pair.k)
    )
    return q, k


def feature_costs(pair: TokenPair, reading: Reading, features: Features, *, source: int, target: int) -> Tensor:
    """Cost maps `[P, h, w]` of features in the target frame, on the CPU.

    What `corrdit.ops.cost_rows` gives for tokens of the source frame with heads="probabilities": the backward softmax
    is over the tokens of the source frame, as there.
    """
    grid, heads = pair.grid, pair.q.shape[1]
    q, k = (part[0, :, grid.frame_slice(target)].float() for part in (pair.q, pair.k))
    forward = torch.einsum("hpd,hsd->hps", features[0], k) * pair.scale
    if pair.key_mask is not None:
        forward = forward.masked_fill(~pair.key_mask[0, grid.frame_slice(target)], float("-inf"))
    cost = forward.softmax(-1)
    if reading.bidirectional:
        _, whole = ops.soft_displacement(
            pair.q.float(), pair.k.float(), grid, heads="none", frames=[(target, source)], scale=pair.scale,
            key_mask=pair.key_mask, return_lse=True, backend=reading.backend,
        )  # fmt: skip
        backward = torch.einsum("hsd,hpd->hps", q, features[1]) * pair.scale
        cost = (cost + (backward - whole.reshape(heads, 1, -1)).exp()) / 2
    weights = torch.ones(heads) if pair.weights is None else torch.tensor(pair.weights)
    mean = torch.einsum("hps,h->ps", cost, (weights / weights.sum()).to(cost))
    return mean.unflatten(1, (grid.height, grid.width)).cpu()
