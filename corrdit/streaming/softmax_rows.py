"""Rows of the softmax of a block: where each leads on average, and how that place depends on the scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.streaming.blocks import Block
from corrdit.streaming.frame_pairs import LOG2_E, PairPass


class SoftmaxRows(NamedTuple):
    """Attributes:
    exponentials: `[n, frames, keys]`, relative to the largest of their row; in tile 0 of the pass.
    inverse: `[n, frames]` reciprocal row sums, 0 for rows without keys.
    expected: `[n, frames, 2]` mean positions of the keys.
    lse: `[n, frames]` log-sum-exp, -inf for rows without keys; None where the problem does not ask for it.
    """

    exponentials: Tensor
    inverse: Tensor
    expected: Tensor
    lse: Tensor | None


def softmax_rows(work: PairPass, queries: Tensor, keys: Tensor, block: Block) -> SoftmaxRows:
    """The rows of a block from its matrices of queries and keys `[n, width]`."""
    exponentials, largest = work.exponentials(work.scores(queries, keys, block, work.problem.factor * LOG2_E))
    rows, frames, count = exponentials.shape
    # One product gives the row sums and both coordinates; this way round it is three times faster on a CPU.
    sums = torch.mm(block.table.sums, exponentials.view(-1, count).t()).view(3, rows, frames)
    inverse = sums[0].reciprocal()
    if work.plan.may_leave_rows_empty:
        inverse.masked_fill_(sums[0] == 0, 0.0)
    lse = (sums[0].log2() + largest.squeeze(-1)) / LOG2_E if work.problem.with_lse else None
    return SoftmaxRows(exponentials, inverse, (sums[1:] * inverse).permute(1, 2, 0), lse)


def displacement_of(work: PairPass, rows: SoftmaxRows, block: Block) -> Tensor:
    """`[n, frames, 2]` from each query to its expected position, 0 for rows without keys."""
    moved = rows.expected - block.own
    if work.plan.may_leave_rows_empty:
        moved.masked_fill_((rows.inverse == 0).unsqueeze(-1), 0.0)
    return moved


def score_gradient(
    work: PairPass, rows: SoftmaxRows, incoming: Tensor, weight: float, block: Block, of_lse: Tensor | None = None
) -> Tensor:
    """The gradient of the products q.k, from that of the displacements.

    Args:
        incoming: `[n, frames, 2]`.
        weight: what the map counts for.
        of_lse: `[n, frames]` gradient of the log-sum-exp, whose own gradient in the scores is P.

    Returns:
        `[n, frames * keys]`: factor * weight * P * (incoming . (position - expected position) + of_lse); in tile 1 of
        the pass.
    """
    exponentials = rows.exponentials
    share = rows.inverse * (work.problem.factor * weight)
    pull = incoming * share.unsqueeze(-1)
    level = (pull * rows.expected).sum(-1)
    if of_lse is not None:
        # What merges shards may send NaN to a row without keys, whose log-sum-exp is -inf.
        level.addcmul_(of_lse.masked_fill(rows.inverse == 0, 0.0), share, value=-1.0)
    columns, lines = block.table.columns, block.table.rows
    along_row = (pull[..., :1] * columns).unsqueeze(-2)
    along_column = (pull[..., 1:] * lines - level.unsqueeze(-1)).unsqueeze(-1)
    count, frames, keys = exponentials.shape
    flat = work.tile(1, count, frames * keys)
    torch.add(along_row, along_column, out=flat.view(count, frames, len(lines), len(columns)))
    return flat.mul_(exponentials.view_as(flat))
