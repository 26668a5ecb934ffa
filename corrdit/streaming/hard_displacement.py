"""Displacement to the best key in blocks of score maps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.streaming.blocks import Block, KeyGroup
from corrdit.streaming.frame_pairs import LOG2_E, PairPass


@torch.no_grad()
def hard_displacement(q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
    """int64 `[B, H or 1, R, 2]`."""
    averaged = problem.heads == "probabilities"
    # The average of probabilities needs the maps of all heads at once, everything else one after the other.
    together = q.shape[1] if averaged else 1
    work = PairPass(q, k, problem, score_tiles=1 + averaged, key_matrices=together, purpose="hard displacement")
    shape = (q.shape[0], work.products.maps // together, problem.rows, 2)
    result = torch.zeros(shape, dtype=torch.int64, device=q.device)
    for batch in range(q.shape[0]):
        for row in range(shape[1]):
            maps = range(row * together, (row + 1) * together)
            for group in work.groups:
                keys = {index: work.key_matrix(batch, index, group) for index in maps}
                for block in work.plan.blocks(batch, group.runs):
                    moved = _to_best(_rating(work, batch, keys, group, block), block)
                    place = work.plan.of_block(result[batch, row], block)
                    place.copy_(moved.transpose(0, 1).reshape(place.shape))
    return result


def _rating(work: PairPass, batch: int, keys: dict[int, Tensor], group: KeyGroup, block: Block) -> Tensor:
    """`[n, frames, keys]` what the best key is the largest of; -inf where a key is not allowed.

    Products that are equal must stay equal for ties to go to the lowest index. BLAS libraries apply a factor here and
    there in different places, with different rounding, so they are given none but 1, 0 and -1.
    """
    factor = work.problem.factor
    average = None
    for index, matrix in keys.items():
        queries, block_keys = work.query_matrix(batch, index, block), work.block_keys(matrix, group, block)
        if not work.products.averaged:
            return work.scores(queries, block_keys, block, math.copysign(bool(factor), factor))
        scores = work.scores(queries * (factor * LOG2_E), block_keys, block, 1.0)
        if average is None:
            average = work.tile(1, queries.shape[0], block_keys.shape[0]).view(scores.shape).zero_()
        exponentials, _ = work.exponentials(scores)
        share = work.products.map_weights[index] / exponentials.sum(-1, keepdim=True)
        average.addcmul_(exponentials, share)
    assert average is not None
    if block.removed is not None:
        average.masked_fill_(block.removed, float("-inf"))
    return average


def _to_best(rating: Tensor, block: Block) -> Tensor:
    """int64 `[n, frames, 2]` from each query to its first best allowed key, 0 where there is none."""
    best = rating.argmax(-1)
    positions = block.table.sums[1:].t().long()
    moved = positions[best] - block.own.long()
    if block.removed is None:
        return moved
    removed = block.removed.expand(rating.shape)
    stuck = removed.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    if stuck.any():
        # Every allowed score is -inf, so that argmax took a removed key; the first allowed one is the best of equals.
        first = (~block.removed).view(torch.uint8).argmax(-1).expand(best.shape)
        moved = torch.where(stuck.unsqueeze(-1), positions[first] - block.own.long(), moved)
        moved = moved.masked_fill_(removed.all(-1, keepdim=True), 0)
    return moved
