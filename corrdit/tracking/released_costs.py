"""Costs and matches in the arithmetic of DiffTrack's released runs: bfloat16, and a second softmax before the maximum.

The released code computes in bfloat16, which has 8 bits of precision, and takes a softmax over the target tokens of the
averaged cost once more. Costs lie near 0, so that the second softmax is nearly flat: about (1 + c) / S for a cost c and
S tokens. Bfloat16 steps by 1/256 to 1/128 of a number, so candidates whose costs differ by less than that may tie, and
of these the lowest index wins. Without rounding the second softmax changes no match.

Source: DiffTrack (arXiv 2506.17220), the code released with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid

ROUNDINGS = ("none", "bfloat16")


def bfloat16_costs(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    source: int,
    target: int,
    scale: float | None = None,
    bidirectional: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Costs of all tokens of a frame in another, every step rounded to bfloat16.

    As much memory as the released code takes: `B * H * S * S` numbers in each direction.

    Args:
        q, k: `[B, H, N, D]`, of any precision.
        grid: of the N tokens; S tokens a frame.
        source, target: frames.
        scale: factor of the products, `D ** -0.5` by default.
        bidirectional: whether the softmax over the source tokens takes part.
        key_mask: bool `[B, N]`, True = may be matched.

    Returns:
        Bfloat16 `[B, S, S]` (source token, target token), the mean over heads.
    """
    divisor = q.shape[-1] ** 0.5 if scale is None else 1 / scale

    def weights(asked: int, given: int) -> Tensor:
        rows, columns = (part[:, :, grid.frame_slice(frame)].bfloat16() for part, frame in ((q, asked), (k, given)))
        logits = torch.einsum("bhid,bhjd->bhij", rows, columns) / divisor
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None, grid.frame_slice(given)], float("-inf"))
        return logits.softmax(-1).mean(1)

    forward = weights(source, target)
    return (forward + weights(target, source).transpose(-1, -2)) / 2 if bidirectional else forward


def bfloat16_rows(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor,
    *,
    source: int,
    scale: float | None = None,
    bidirectional: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Costs of R tokens of a frame in all others, 0 in its own: float32 `[B, 1, R, F, h, w]` on the CPU.

    Args:
        tokens: int64 `[R]`, flat in the source frame.
        q, k, grid, source, scale, bidirectional, key_mask: as for `bfloat16_costs`.
    """
    rows = torch.zeros(len(q), 1, len(tokens), grid.frames, grid.tokens_per_frame)
    for target in range(grid.frames):
        if target != source:
            costs = bfloat16_costs(
                q, k, grid, source=source, target=target, scale=scale, bidirectional=bidirectional, key_mask=key_mask
            )
            rows[:, 0, :, target] = costs[:, tokens.to(costs.device)].float().cpu()
    return rows.unflatten(-1, (grid.height, grid.width))


def tied_best(costs: Tensor, parts: int = 1) -> Tensor:
    """The best target token of each source token after the second softmax in bfloat16, the lowest of equal ones.

    Args:
        costs: `[..., S]` over target tokens.
        parts: layers times steps whose channels were joined, by whose number the released tracker divides.

    Returns:
        int64 `[...]`.
    """
    return (costs.bfloat16() / parts).softmax(-1).argmax(-1)


def bfloat16_matches(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    scale: float | None = None,
    bidirectional: bool = True,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Matches of the tokens of the first frame in every later one, as `corrdit.ops.match` gives them but rounded.

    Args:
        q, k, grid, scale, bidirectional, key_mask: as for `bfloat16_costs`.

    Returns:
        float32 `[B, F - 1, h, w, 2]`, (x, y) in tokens.
    """
    found = []
    for target in range(1, grid.frames):
        costs = bfloat16_costs(
            q, k, grid, source=0, target=target, scale=scale, bidirectional=bidirectional, key_mask=key_mask
        )
        best = tied_best(costs)
        found.append(torch.stack((best % grid.width, best // grid.width), -1))
    return torch.stack(found, 1).unflatten(2, (grid.height, grid.width)).float()
