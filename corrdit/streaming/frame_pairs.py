"""One pass over the score maps of frame pairs: plan, workspace, and the matrices that each block multiplies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.problem import PairProblem
from corrdit.streaming.blocks import Block, BlockPlan, KeyGroup, key_groups, take
from corrdit.streaming.budget import frames_in_a_group, rows_in_a_chunk
from corrdit.streaming.products import HeadProducts

# exp2 is several times faster than exp on a CPU; the change of base is free inside the factor of a matrix product.
LOG2_E = math.log2(math.e)


class PairPass:
    """Workspace and plan of one pass over all blocks of the score maps.

    Args:
        score_tiles: buffers of the size of a block that the pass needs.
        key_matrices: matrices of the size of a group's keys that it needs, the keys included.
        reserved_bytes: workspace that the caller allocates itself.
        purpose: named when the budget is too small.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        problem: PairProblem,
        *,
        score_tiles: int,
        key_matrices: int,
        purpose: str,
        reserved_bytes: int = 0,
    ) -> None:
        self.q, self.k, self.problem = q, k, problem
        self.grid = grid = problem.grid
        self.products = products = HeadProducts(q, k, problem)
        tokens, size = grid.tokens_per_frame, products.element_bytes
        masked = problem.key_mask is not None or problem.keys.selection != "all" or problem.window is not None
        copied = products.copied_width * size
        frames, frame_bytes = 1, tokens * (products.width * size * key_matrices + copied)
        if problem.window is None:
            frames = frames_in_a_group(problem.memory_budget, frame_bytes, grid.frames, tokens)
        else:
            frame_bytes *= 2  # the rectangle of keys a tile reads, and that of their gradients
        rows = rows_in_a_chunk(
            problem.memory_budget,
            fixed_bytes=reserved_bytes + frames * frame_bytes + 16 * tokens * size,
            row_bytes=frames * (tokens * (score_tiles * size + 3 * masked) + 24 * size) + 4 * copied,
            tile_row_bytes=frames * tokens * size,
            rows=tokens,
            device=q.device,
            purpose=purpose,
        )
        self.groups = key_groups(problem, frames)
        self.plan = BlockPlan(problem, rows, q.device, products.dtype)
        self._tiles = torch.empty((score_tiles, rows * frames * tokens), dtype=products.dtype, device=q.device)

    def tile(self, number: int, queries: int, keys: int) -> Tensor:
        """A buffer `[queries, keys]`; its contents last until the next block."""
        return self._tiles[number, : queries * keys].view(queries, keys)

    def key_matrix(self, batch: int, index: int, group: KeyGroup) -> Tensor:
        """`[frames * S, width]` keys of a group; removed keys are 0, so that not even a NaN of theirs spreads."""
        place, rows = self.keys_of_group(group)
        keys = self.products.keys(self.products.key_heads(self.k[batch], index)[:, place])
        if self.problem.key_mask is not None:
            keys = keys.masked_fill(~self.problem.key_mask[batch, place].unsqueeze(-1), 0.0)
        whole = group.frames * self.grid.tokens_per_frame
        return keys if len(keys) == whole else functional.pad(keys, (0, 0, rows.start, whole - rows.stop))

    def keys_of_group(self, group: KeyGroup) -> tuple[slice, slice]:
        """Where the keys of a group that are there stand: in the token axis of k, and in the group's matrix."""
        place = self.problem.keys.between(group.frame, group.frame + group.frames - 1)
        first = self.problem.keys.frames[group.frame].first
        return place, slice(first, first + place.stop - place.start)

    def part_of_group(self, matrix: Tensor, group: KeyGroup, block: Block) -> Tensor:
        """The rows of a group's matrix `[frames * S, width]` that a block is about, `[..., width]`; a view."""
        if self.problem.window is not None:
            return take(matrix, block.keys, 0, self.grid)
        tokens = self.grid.tokens_per_frame
        first = (block.run.key_frame - group.frame) * tokens
        return matrix[first : first + block.run.key_frames * tokens]

    def block_keys(self, keys: Tensor, group: KeyGroup, block: Block) -> Tensor:
        """`[n, width]` keys that a block reads."""
        return self.part_of_group(keys, group, block).reshape(-1, self.products.width)

    def query_part(self, tensor: Tensor, batch: int, index: int, block: Block) -> Tensor:
        """The queries of a block in a tensor like q: a view `[H or 1, ..., D]`."""
        held = self.problem.queries.frames[block.run.query_frame]
        return take(self.products.query_heads(tensor[batch], index), block.queries, held.origin, self.grid)

    def query_matrix(self, batch: int, index: int, block: Block) -> Tensor:
        """`[n, width]` queries of a block."""
        return self.products.queries(self.query_part(self.q, batch, index, block))

    def query_gradient(self, slope: Tensor, keys: Tensor) -> Tensor:
        """`[n, width]` gradient of a block's queries from that of their scores."""
        if self.problem.window is not None:
            # The rectangle has keys that a query does not see, and 0 times a NaN of theirs would be NaN.
            keys = keys.nan_to_num(0.0, 0.0, 0.0)
        return torch.mm(slope, keys)

    def rows_of(self, field: Tensor, block: Block) -> Tensor:
        """The rows of a block `[n, frames, D]` in `[R, D]` of all pairs."""
        return self.plan.of_block(field, block).reshape(block.run.key_frames, -1, field.shape[-1]).transpose(0, 1)

    def scores(self, queries: Tensor, keys: Tensor, block: Block, factor: float) -> Tensor:
        """`[n, frames, keys]` products of a block times a factor, -inf where a key is not allowed; in tile 0."""
        flat = self.tile(0, queries.shape[0], keys.shape[0])
        torch.addmm(flat, queries, keys.t(), beta=0, alpha=factor, out=flat)
        scores = flat.view(-1, block.run.key_frames, block.keys.tokens)
        if block.removed is not None:
            scores.masked_fill_(block.removed, float("-inf"))
        return scores

    def exponentials(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores in base 2 to exponentials relative to the largest of a row, in place; all 0 in a row without keys.

        Returns:
            The exponentials, and the largest score of each row `[..., 1]`, 0 for a row without keys.
        """
        largest = scores.amax(-1, keepdim=True)
        if self.plan.may_leave_rows_empty:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        return scores.sub_(largest).exp2_(), largest
