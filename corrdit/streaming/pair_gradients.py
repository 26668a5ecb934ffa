"""Gradients in q and k from those of the scores, block by block."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from corrdit.streaming.blocks import Block, KeyGroup, take
from corrdit.streaming.frame_pairs import PairPass


class Slopes(Protocol):
    """The gradient with respect to the products q.k of a block."""

    def of_block(self, batch: int, index: int, queries: Tensor, keys: Tensor, block: Block) -> Tensor:
        """`[n, keys]`, from the block's matrices of queries and keys; it lasts until the next block."""


def add_gradients(work: PairPass, slopes: Slopes, dq: Tensor | None, dk: Tensor | None) -> None:
    """Adds to `dq` and writes `dk`, in any precision.

    In the working precision every block is visited once; gradients of queries in half precision cost another visit.
    """
    for batch in range(work.q.shape[0]):
        for maps in work.products.map_groups:
            if dq is None or dq.dtype == work.products.dtype:
                _add_key_and_query_gradients(work, slopes, batch, maps, dq, dk)
                continue
            # Gradients in half precision are summed in float32 and rounded once. Those of the keys are complete when
            # their group is; those of the queries would be at the very end only, so they get a pass of their own.
            if dk is not None:
                _add_key_and_query_gradients(work, slopes, batch, maps, None, dk)
            for index in maps:
                for frame in sorted({i for i, _ in work.problem.pairs}):
                    _store_frame_gradient(work, slopes, batch, index, dq, frame)


def _add_key_and_query_gradients(
    work: PairPass, slopes: Slopes, batch: int, maps: range, dq: Tensor | None, dk: Tensor | None
) -> None:
    """Adds to `dq`, which has the working dtype, and writes `dk`, which may have any; one pass over the blocks.

    Args:
        maps: those that read the same keys, whose gradient is complete with the last of them.
    """
    products = work.products
    for group in work.groups:
        keys = work.key_matrix(batch, maps[0], group)
        total = None if dk is None else torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
        for index in maps:
            for block in work.plan.blocks(batch, group.runs):
                queries = work.query_matrix(batch, index, block)
                block_keys = work.block_keys(keys, group, block)
                slope = slopes.of_block(batch, index, queries, block_keys, block)
                if total is not None:
                    _add_key_gradient(work, total, group, block, slope, queries)
                if dq is not None:
                    products.add_query_gradient(
                        work.query_part(dq, batch, index, block), work.query_gradient(slope, block_keys)
                    )
        if dk is not None and total is not None:
            place, rows = work.keys_of_group(group)
            products.store_key_gradient(products.key_heads(dk[batch], maps[0])[:, place], total[rows])


def _add_key_gradient(
    work: PairPass, total: Tensor, group: KeyGroup, block: Block, slope: Tensor, queries: Tensor
) -> None:
    place = work.part_of_group(total, group, block)
    if place.ndim == 2:
        place.addmm_(slope.t(), queries)
    else:
        place.add_(torch.mm(slope.t(), queries).view(place.shape))


def _store_frame_gradient(work: PairPass, slopes: Slopes, batch: int, index: int, dq: Tensor, frame: int) -> None:
    """Sums the gradient of one query frame over all its pairs in the working dtype, then writes it to `dq`."""
    products, held = work.products, work.problem.queries.frames[frame]
    target = products.query_heads(dq[batch], index)[:, held.place]
    total = torch.zeros(target.shape, dtype=products.dtype, device=dq.device)
    for group in work.groups:
        runs = [run for run in group.runs if run.query_frame == frame]
        if not runs:
            continue
        keys = work.key_matrix(batch, index, group)
        for block in work.plan.blocks(batch, runs):
            block_keys = work.block_keys(keys, group, block)
            slope = slopes.of_block(batch, index, work.query_matrix(batch, index, block), block_keys, block)
            part = take(total, block.queries, -held.first, work.grid)
            products.add_query_gradient(part, work.query_gradient(slope, block_keys))
    target.copy_(total)
