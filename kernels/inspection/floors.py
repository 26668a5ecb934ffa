"""What a score of soft displacement costs at least: the floors that compiled kernels are compared with.

A multiprocessor of 9.0 issues 128 instructions of a thread in a cycle (four warps), takes 16 exponentials and 2048
multiply-adds of a 16-bit matrix product. For one score, with D the padded head_dim:

- tensor cores: forward q.k and the product of weights with coordinates, (D + 16) / 2048 cycles; backward q.k,
  g.(p' - e) and the product of dlogit with k (for dq) or q (for dk), (2 D + 16) / 2048, which is 0.0703 at D = 64;
- exponentials: one, 1/16 = 0.0625 cycles;
- issue: the instructions no kernel on these units can do without, over 128.

The units work side by side, so the largest is the floor. Backward at D = 64 it is the tensor cores' 0.0703 cycles, in
which 9.0 instructions issue. The instructions that cannot be avoided are, for each score:

- forward: multiply-add of the exponent, maximum, exponential, half a conversion (two scores in one): 3.5;
- backward: multiply-add of the exponent, exponential, product with g.(p' - e), half a conversion: 3.5; dk also a
  quarter of a load, for the shifts of its queries lie along the columns of the accumulator (one load of two shifts
  serves two keys);
- for each tile, over a thread's scores of it: every wgmma and one instruction for its operands' descriptor, arriving at
  and waiting for each group of them, a barrier, and counting and branching.

At D = 64, tiles of 128 x 128 and eight warps that is 4.05 instructions for dq and 4.30 for dk, 0.032 and 0.034 cycles.
The compiled loops have 5.53 and 6.11, 0.043 and 0.048 cycles: issue stays below the exponentials and the tensor cores,
whose work the machine code shows to be the 0.0703 cycles of the floor and no more, so the estimate for both is the
floor itself. Against the instructions alone they stand at 1.37 and 1.42. What is between cannot be taken out of the
loop from Triton: it puts a proxy fence before each of the three products (21 of the 354 instructions of dq for 64
scores), because asynchronous copies write shared memory through another proxy than wgmma reads it; the copies, their
addresses and the counters of their buffers are about 30 more, the upper halves of the descriptors 18. Copies by TMA
would spare the first two, but take only tensors whose dims are adjacent and whose other strides are multiples of 16
bytes. Larger tiles, or the loop unrolled twice, spill.
"""

from __future__ import annotations

from typing import NamedTuple

from corrdit.kernels.shared.configs import Tiles, padded_head_dim

# Lanes a multiprocessor issues in a cycle, exponentials, and multiply-adds of 16-bit matrix products (by architecture).
ISSUE_LANES = 128
EXPONENTIALS = 16
TENSOR_PRODUCTS = {"8.0": 1024, "8.9": 512, "9.0": 2048, "10.0": 4096}
_COORDINATE_DEPTH = 16
_WGMMA_ROWS, _WGMMA_DEPTH = 64, 16


class Floor(NamedTuple):
    """Cycles of a multiprocessor for a score, which unit binds, and the instructions no kernel can do without."""

    cycles: float
    unit: str
    instructions: float


def soft_floor(kernel: str, head_dim: int, architecture: str, tiles: Tiles) -> Floor | None:
    """The floor of a kernel of soft displacement of single heads in 16-bit precision; None for any other kernel.

    Args:
        kernel: "soft_forward", "soft_backward_query" or "soft_backward_key".
    """
    depth = padded_head_dim(head_dim)
    if kernel == "soft_forward":
        products, instructions, queries, along, groups = depth + _COORDINATE_DEPTH, 3.5, tiles.rows, tiles.columns, 2
    elif kernel == "soft_backward_query":
        products, instructions, queries, along, groups = 2 * depth + 16, 3.5, tiles.rows, tiles.columns, 3
    elif kernel == "soft_backward_key":
        products, instructions, queries, along, groups = 2 * depth + 16, 3.75, tiles.columns, tiles.rows, 3
    else:
        return None
    if architecture == "9.0":
        steps = (depth + along + (_COORDINATE_DEPTH if groups == 3 else 0)) / _WGMMA_DEPTH
        # A warp group issues each step once for every 64 of its rows.
        steps *= max(1.0, queries / _WGMMA_ROWS / (tiles.warps / 4))
        instructions += (2 * steps + 2 * groups + 3) / (tiles.rows * tiles.columns / (32 * tiles.warps))
    units = {
        "tensor": products / TENSOR_PRODUCTS[architecture],
        "exponential": 1 / EXPONENTIALS,
        "issue": instructions / ISSUE_LANES,
    }
    unit = max(units, key=units.__getitem__)
    return Floor(units[unit], unit, instructions)
