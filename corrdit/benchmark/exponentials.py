"""How many exponentials a GPU computes in a second: the unit that bounds a softmax over small heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8


@triton.jit
def exponentials_kernel(out, rounds, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Every number goes `rounds` times through 2**-x, which stays between 0.5 and 1 and can not be left out."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = offsets.to(tl.float32) * 1e-9
    for _ in range(rounds):
        value = tl.exp2(-value)
    tl.store(out + offsets, value)


def exponentials(device: torch.device, programs: int, rounds: int) -> Tensor:
    """float32 `[programs * BLOCK]`, each number the result of `rounds` exponentials.

    Args:
        programs: blocks of threads; several for each multiprocessor keep its unit busy.
    """
    out = torch.empty(programs * BLOCK, device=device)
    exponentials_kernel[(programs,)](out, rounds, BLOCK=BLOCK, num_warps=WARPS)
    return out
