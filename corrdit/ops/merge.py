"""The result over all keys from those over shards of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.problem import DTYPES, working_dtype


def merge(results: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """The result over all keys from those over shards of them, for what a softmax averages.

    Exact for `soft_displacement` and `frame_local_attention` with `return_lse=True`, whose shards of keys are disjoint:
    each result counts for its share of the sum of exponentials. The log-sum-exp of the merged result is
    `torch.stack(lses).logsumexp(0)`, by which it can be merged further. Each result of keys that a mask removed counts
    nothing.

    Args:
        results: one `[..., D]` a shard, all of one shape, dtype and device.
        lses: `[...]` log-sum-exp of each, base e, float32 (float64 for float64 results), as the operations return it.

    Returns:
        `[..., D]` in the dtype of the results, 0 where no shard has a key. Differentiable in all of them.

    Raises:
        ValueError: none, or shapes, dtypes or devices that do not fit.
    """
    results, lses = list(results), list(lses)
    if not results or len(results) != len(lses):
        raise ValueError(
            f"results and lses must be lists of one tensor a shard, got {len(results)} results and {len(lses)} lses"
        )
    for result, lse in zip(results, lses, strict=True):
        for name, tensor in (("results", result), ("lses", lse)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
                given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} must be floating-point tensors, got {given}")
        first = results[0]
        if (result.shape, result.dtype, result.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"results must have one shape, dtype and device, got {list(first.shape)} {first.dtype} on "
                f"{first.device} and {list(result.shape)} {result.dtype} on {result.device}"
            )
        if lse.shape != result.shape[:-1]:
            raise ValueError(
                f"lses must have the shape of the results without the last axis, {list(result.shape[:-1])}, "
                f"got {list(lse.shape)}"
            )
        if (lse.dtype, lse.device) != (working_dtype(result.dtype), result.device):
            raise ValueError(
                f"lses of {result.dtype} results on {result.device} must be {working_dtype(result.dtype)} there, as"
                f" the operations return them, got {lse.dtype} on {lse.device}"
            )
    dtype = lses[0].dtype
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    largest = stacked.detach().amax(0)
    # Where no shard has a key every log-sum-exp is -inf: any finite level gives every shard the weight 0.
    weights = (stacked - largest.masked_fill(largest == float("-inf"), 0.0)).exp()
    total = weights.sum(0)
    shares = weights / total.masked_fill(total == 0, 1.0)
    merged = torch.stack([result.to(dtype) for result in results]).mul(shares.unsqueeze(-1)).sum(0)
    return merged.to(results[0].dtype)
