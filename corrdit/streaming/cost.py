"""Rows of the cost map C between two frames, without the map: the backward softmax needs only its row sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.streaming.budget import rows_in_a_chunk
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.products import HeadProducts


@dataclass(frozen=True)
class CostProblem:
    """What a cost map is made of; see `corrdit.ops.match`."""

    grid: TokenGrid
    heads: str
    weights: Tensor | None
    scale: float
    key_mask: Tensor | None
    bidirectional: bool
    memory_budget: int | None


class _FrameMatrices:
    """The query matrix of one frame, times the factor of the scores, and its key matrix."""

    def __init__(self, cost: CostRows, batch: int, index: int, frame: int) -> None:
        heads = cost.products.heads_of
        tokens = cost.problem.grid.frame_slice(frame)
        # The factor goes into the queries: in the product, BLAS may round equal scores differently and break ties.
        queries = cost.products.queries(heads(cost.q[batch], index)[:, tokens])
        self.queries = queries * (cost.problem.scale * LOG2_E)
        self.keys = cost.products.keys(heads(cost.k[batch], index)[:, tokens])
        self.removed: Tensor | None = None
        if cost.problem.key_mask is not None:
            self.removed = ~cost.problem.key_mask[batch, tokens]
            self.keys = self.keys.masked_fill(self.removed.unsqueeze(-1), 0.0)


class CostRows:
    """Rows of C = (P_forward + P_backward^T) / 2, or of P_forward, between a source and a target frame.

    A row of C crosses every row of the backward softmax, so a first pass over the frame pair finds the logarithms of
    their sums, O(H*S) numbers, and the rows of C follow from products of their own in chunks of any size.
    """

    def __init__(self, q: Tensor, k: Tensor, problem: CostProblem, rows: int, purpose: str) -> None:
        self.q, self.k, self.problem = q, k, problem
        self.products = products = HeadProducts(q, problem.heads, problem.weights)
        # Maps whose mean is one cost map; those of heads="none" are cost maps of their own.
        self.maps_together = products.maps if products.averaged else 1
        tokens, size = problem.grid.tokens_per_frame, products.element_bytes
        matrices = tokens * size * (6 * self.maps_together * products.width + products.copied_width)
        self.rows = rows_in_a_chunk(
            problem.memory_budget,
            fixed_bytes=matrices + (3 * self.maps_together + 24) * tokens * size,
            row_bytes=tokens * (3 * size + 2) + products.width * size + 8 * size,
            tile_row_bytes=tokens * size,
            rows=max(rows, tokens) if problem.bidirectional else rows,
            device=q.device,
            purpose=purpose,
        )
        self._cost = torch.empty(self.rows * tokens, dtype=products.dtype, device=q.device)
        self._scores = torch.empty_like(self._cost)

    def of_frames(self, batch: int, maps: range, source: int, target: int) -> FramePairCost:
        """The cost map of a pair of frames, from the mean over some of the head maps."""
        return FramePairCost(self, batch, maps, source, target)

    def map_groups(self) -> list[range]:
        """The head maps that each cost map of a batch entry is the mean of."""
        return [range(first, first + self.maps_together) for first in range(0, self.products.maps, self.maps_together)]

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[n, m]` logits in base 2, in a buffer."""
        flat = self._scores[: queries.shape[0] * keys.shape[0]].view(queries.shape[0], keys.shape[0])
        return torch.mm(queries, keys.t(), out=flat)

    def zeros(self, rows: int) -> Tensor:
        tokens = self.problem.grid.tokens_per_frame
        return self._cost[: rows * tokens].view(rows, tokens).zero_()


class FramePairCost:
    """C of one frame pair; `rows` gives any of its rows."""

    def __init__(self, cost: CostRows, batch: int, maps: range, source: int, target: int) -> None:
        self.cost = cost
        self.maps = maps
        self.sources = {index: _FrameMatrices(cost, batch, index, source) for index in maps}
        self.targets = {index: _FrameMatrices(cost, batch, index, target) for index in maps}
        self.backward_log_sums = {}
        if cost.problem.bidirectional:
            self.backward_log_sums = {index: self._backward_log_sum(index) for index in maps}

    def _backward_log_sum(self, index: int) -> Tensor:
        """`[S]` for each target token: log2 of the sum over source keys of 2 ** logit; inf without any key."""
        queries, source = self.targets[index].queries, self.sources[index]
        log_sums = []
        for part in queries.split(self.cost.rows):
            scores = _remove_keys(self.cost.scores(part, source.keys), source.removed)
            largest = _largest(scores, source.removed)
            sums = scores.sub_(largest).exp2_().sum(-1)
            log_sums.append(torch.where(sums == 0, float("inf"), sums.log2() + largest.squeeze(-1)))
        return torch.cat(log_sums)

    def rows(self, tokens: slice | Tensor) -> Tensor:
        """`[n, S target]` rows of C for tokens of the source frame, in a buffer that the next call overwrites."""
        result = None
        share = 0.5 if self.cost.problem.bidirectional else 1.0
        for index in self.maps:
            source, target = self.sources[index], self.targets[index]
            scores = _remove_keys(self.cost.scores(source.queries[tokens], target.keys), target.removed)
            if result is None:
                result = self.cost.zeros(scores.shape[0])
            weight = share * self.cost.products.map_weights[index]
            exponentials = scores.sub_(_largest(scores, target.removed)).exp2_()
            sums = exponentials.sum(-1, keepdim=True)
            factor = torch.where(sums == 0, 0.0, weight / sums) if target.removed is not None else weight / sums
            result.addcmul_(exponentials, factor)
            if self.cost.problem.bidirectional:
                scores = self.cost.scores(source.keys[tokens], target.queries)
                if source.removed is not None:
                    scores.masked_fill_(source.removed[tokens].unsqueeze(-1), float("-inf"))
                result.add_(scores.sub_(self.backward_log_sums[index]).exp2_(), alpha=weight)
        assert result is not None
        return result


def _remove_keys(scores: Tensor, removed: Tensor | None) -> Tensor:
    return scores if removed is None else scores.masked_fill_(removed, float("-inf"))


def _largest(scores: Tensor, removed: Tensor | None) -> Tensor:
    """`[n, 1]` largest score of each row; 0 for a row without keys, whose exponentials then are 0."""
    largest = scores.amax(-1, keepdim=True)
    return largest if removed is None else largest.masked_fill_(largest == float("-inf"), 0.0)
