"""Rows of the cost map C between two frames, without the map: the backward softmax needs only its row sums."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.problem import PairProblem
from corrdit.streaming.budget import rows_in_a_chunk
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.products import HeadProducts


class _FrameMatrices:
    """The query matrix of what q holds of one frame, times the factor of the scores, and the frame's key matrix."""

    def __init__(self, cost: CostRows, batch: int, index: int, frame: int) -> None:
        problem, products = cost.problem, cost.products
        self.queries: Tensor | None = None
        if frame in problem.queries.frames:
            held = problem.queries.frames[frame]
            queries = products.queries(products.query_heads(cost.q[batch], index)[:, held.place])
            # The factor goes into the queries: in the product, BLAS may round equal scores differently and break ties.
            self.queries, self.first = queries * (problem.factor * LOG2_E), held.first
        size = problem.grid.tokens_per_frame
        self.removed = cost.removed(batch, frame)
        if frame not in problem.keys.frames:
            self.keys = torch.zeros(size, products.width, dtype=products.dtype, device=cost.q.device)
            return
        held = problem.keys.frames[frame]
        self.keys = products.keys(products.key_heads(cost.k[batch], index)[:, held.place])
        if held.tokens < size:
            self.keys = functional.pad(self.keys, (0, 0, held.first, size - held.stop))
        if self.removed is not None:
            self.keys = self.keys.masked_fill(self.removed.unsqueeze(-1), 0.0)

    def chosen_queries(self, tokens: slice | Tensor) -> Tensor:
        """`[n, width]` of tokens of the frame."""
        assert self.queries is not None
        if isinstance(tokens, slice):
            return self.queries[tokens.start - self.first : tokens.stop - self.first]
        return self.queries[tokens - self.first]


class CostRows:
    """Rows of C = (P_forward + P_backward^T) / 2, or of P_forward, between a source and a target frame.

    A row of C crosses every row of the backward softmax, so a first pass over the frame pair finds the logarithms of
    their sums, O(H*S) numbers, and the rows of C follow from products of their own in chunks of any size.
    """

    def __init__(
        self, q: Tensor, k: Tensor, problem: PairProblem, *, bidirectional: bool, rows: int, purpose: str
    ) -> None:
        self.q, self.k, self.problem, self.bidirectional = q, k, problem, bidirectional
        self.products = products = HeadProducts(q, k, problem)
        mask = problem.video_mask()
        self._removed = None if mask is None else ~mask.to(q.device)
        # Maps whose mean is one cost map; those of heads="none" are cost maps of their own.
        self.maps_together = products.maps if products.averaged else 1
        tokens, size = problem.grid.tokens_per_frame, products.element_bytes
        matrices = tokens * size * (6 * self.maps_together * products.width + products.copied_width)
        self.rows = rows_in_a_chunk(
            problem.memory_budget,
            fixed_bytes=matrices + (3 * self.maps_together + 24) * tokens * size,
            row_bytes=tokens * (3 * size + 2) + products.width * size + 8 * size,
            tile_row_bytes=tokens * size,
            rows=max(rows, tokens) if bidirectional else rows,
            device=q.device,
            purpose=purpose,
        )
        self._cost = torch.empty(self.rows * tokens, dtype=products.dtype, device=q.device)
        self._scores = torch.empty_like(self._cost)

    def removed(self, batch: int, frame: int) -> Tensor | None:
        """bool `[S]`, True where a key must not be attended or is not there; None without such keys."""
        size = self.problem.grid.tokens_per_frame
        if self._removed is not None:
            return self._removed[batch % len(self._removed), frame * size : (frame + 1) * size]
        if frame in self.problem.keys.frames:
            return None
        return torch.ones(size, dtype=torch.bool, device=self.q.device)

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
        if cost.bidirectional:
            self.backward_log_sums = {index: self._backward_log_sum(index) for index in maps}

    def _backward_log_sum(self, index: int) -> Tensor:
        """`[S]` for each target token: log2 of the sum over source keys of 2 ** logit; inf without any key."""
        queries, source = self.targets[index].queries, self.sources[index]
        assert queries is not None
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
        share = 0.5 if self.cost.bidirectional else 1.0
        for index in self.maps:
            source, target = self.sources[index], self.targets[index]
            scores = _remove_keys(self.cost.scores(source.chosen_queries(tokens), target.keys), target.removed)
            if result is None:
                result = self.cost.zeros(scores.shape[0])
            weight = share * self.cost.products.map_weights[index]
            exponentials = scores.sub_(_largest(scores, target.removed)).exp2_()
            sums = exponentials.sum(-1, keepdim=True)
            factor = torch.where(sums == 0, 0.0, weight / sums) if target.removed is not None else weight / sums
            result.addcmul_(exponentials, factor)
            if target.queries is not None and self.cost.bidirectional:
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
