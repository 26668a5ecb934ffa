"""How many query rows are worked on at a time: as many as the memory budget allows, as few as stay in the cache."""

from __future__ import annotations

import torch

DEFAULT_MEMORY_BUDGET = 256 * 2**20
# One score tile. On a CPU it should stay in the cache between the matrix product and the passes over it (measured:
# 1 to 4 MB are equal, 16 MB is slower); an accelerator wants launches that are large enough to fill it.
CPU_TILE_BYTES = 2 * 2**20
ACCELERATOR_TILE_BYTES = 64 * 2**20
# Query rows for which the default budget grows if it must; fewer would make the matrix products too small.
LEAST_ROWS = 64
# Frames smaller than this are worked on in groups, so that a matrix product is never narrower than about this.
KEYS_IN_A_GROUP = 1536


def frames_in_a_group(memory_budget: int | None, frame_bytes: int, frames: int, tokens_per_frame: int) -> int:
    """Key frames that share one matrix product; their `frame_bytes` each take a quarter of the budget at most."""
    return max(1, min(frames, KEYS_IN_A_GROUP // tokens_per_frame, _bytes(memory_budget) // (4 * frame_bytes)))


def keys_in_a_segment(memory_budget: int | None, key_bytes: int, keys: int) -> int:
    """Keys that are copied at a time; their `key_bytes` each take a quarter of the budget at most."""
    return max(1, min(keys, KEYS_IN_A_GROUP, _bytes(memory_budget) // (4 * key_bytes)))


def _bytes(memory_budget: int | None) -> int:
    return DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget


def rows_in_a_chunk(
    memory_budget: int | None,
    *,
    fixed_bytes: int,
    row_bytes: int,
    tile_row_bytes: int,
    rows: int,
    device: torch.device,
    purpose: str,
) -> int:
    """Query rows worked on at a time.

    Args:
        memory_budget: bytes beyond inputs and outputs; None for `DEFAULT_MEMORY_BUDGET`, or what `LEAST_ROWS` need.
        fixed_bytes: workspace that does not depend on the number of rows.
        row_bytes: workspace of one row.
        tile_row_bytes: the part of `row_bytes` that the passes after the matrix product go over.
        rows: rows there are.
        purpose: what the workspace is for, for the error message.

    Raises:
        ValueError: not even one row fits into the budget that was given.
    """
    budget = _bytes(memory_budget)
    affordable = (budget - fixed_bytes) // row_bytes
    if memory_budget is None:
        # Nobody asked for it: it grows where the keys of one frame alone exceed it (H * D of 5120, 45 x 80 tokens).
        affordable = max(affordable, LEAST_ROWS)
    if affordable < 1:
        raise ValueError(
            f"memory_budget={budget} bytes is too small for {purpose}: one query row at a time needs "
            f"{fixed_bytes + row_bytes} bytes; give at least that"
        )
    tile_bytes = CPU_TILE_BYTES if device.type == "cpu" else ACCELERATOR_TILE_BYTES
    fitting = min(rows, affordable, max(16, tile_bytes // tile_row_bytes))
    # Equal chunks: a short last one would run its matrix products at a fraction of the speed.
    chunks = -(-rows // fitting)
    return -(-rows // chunks)
