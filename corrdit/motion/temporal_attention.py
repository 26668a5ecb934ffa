"""MotionClone's motion representation, for transformers whose attention runs over space and time at once.

Ling et al., "MotionClone: Training-Free Motion Cloning for Controllable Video Generation" (2024): the temporal
attention of the reference, of which only the largest weights are followed. A video transformer has no temporal
attention of its own; it is cut out of the joint one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.arguments import whole_number
from corrdit.grid import TokenGrid


def temporal_attention(q: Tensor, k: Tensor, grid: TokenGrid, *, scale: float | None = None) -> Tensor:
    """Attention of each token on the tokens at its own place in the other frames.

    The own frame is left out: in joint attention a token's own key wins against all others, so the largest weight would
    never say anything about motion.

    Args:
        q, k: `[B, H, N, D]`.
        grid: how the N tokens are arranged; at least two frames.
        scale: of q.k, `D ** -0.5` by default.

    Returns:
        float32 (float64 for float64) `[B, H, S, F, F]` (place, query frame, key frame), each row summing to 1 over the
        key frames, 0 on the diagonal.

    Raises:
        ValueError: one frame only.
    """
    if grid.frames < 2:
        raise ValueError("temporal attention needs at least two frames, the grid has one")
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # [B, H, S, F, D]
    queries, keys = (
        tensor[:, :, grid.video_slice].to(dtype).unflatten(2, (grid.frames, -1)).transpose(2, 3) for tensor in (q, k)
    )
    logits = scale * queries @ keys.transpose(-1, -2)
    own = torch.eye(grid.frames, dtype=torch.bool, device=q.device)
    return logits.masked_fill(own, float("-inf")).softmax(-1)


def temporal_attention_loss(
    target: Tensor, reference: Tensor, *, largest: int = 1, region: Tensor | None = None
) -> Tensor:
    """Mean squared difference of attention weights where the reference's are largest.

    Args:
        target: `[..., F, F]` as `temporal_attention` gives it; the loss is differentiable in it.
        reference: the same shape.
        largest: weights of each row that are followed (MotionClone takes 1).
        region: bool `[F, h, w]`, the tokens whose rows count, of attention `[B, H, S, F, F]`; None for all.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that differ, or `largest` outside 1 to F - 1.
    """
    if target.shape != reference.shape or target.ndim < 2:
        raise ValueError(
            f"target and reference must be attention [..., F, F] of one shape, got {list(target.shape)} and "
            f"{list(reference.shape)}"
        )
    largest = whole_number("largest", largest, 1)
    if largest >= reference.shape[-1]:
        raise ValueError(f"largest is {largest}, but a row has {reference.shape[-1] - 1} other frames")
    followed = reference.topk(largest, dim=-1).indices
    squared = (target.gather(-1, followed) - reference.gather(-1, followed)).square()
    return squared.mean() if region is None else squared[:, :, _rows_of(region, target)].mean()


def diagonal_roughness(attention: Tensor, *, region: Tensor | None = None) -> Tensor:
    """How unsteady temporal attention is along its diagonals, above all at the places where it is least steady.

    A diagonal holds the weights between frames of one distance, one after the other; where motion is steady they stay
    the same. The idea is TeDiO's ("Temporal Diagonal Optimization for Training-Free Coherent Video Diffusion", arXiv
    2605.14136); the measure is our own: for every place the mean squared difference of neighbours on its diagonals, and
    the root mean square of that over places, in which the least steady ones count most.

    Args:
        attention: `[B, H, S, F, F]` as `temporal_attention` gives it, at least three frames.
        region: bool `[F, h, w]`; places count that are in it in some frame. None for all.

    Returns:
        Scalar, 0 for attention that depends on the distance of frames alone.

    Raises:
        ValueError: another shape, fewer than three frames, or a region without a place.
    """
    if attention.ndim != 5 or attention.shape[-1] != attention.shape[-2] or attention.shape[-1] < 3:
        raise ValueError(
            f"attention must be [B, H, S, F, F] of at least three frames, got {list(attention.shape)}; give a longer "
            "video"
        )
    frames = attention.shape[-1]
    between = attention[..., 1:, 1:] - attention[..., :-1, :-1]
    beside = ~torch.eye(frames - 1, dtype=torch.bool, device=attention.device)
    # [S], mean over samples, heads and the diagonals beside the main one, which is 0
    rough = between.square()[..., beside].mean((0, 1, 3))
    if region is not None:
        rough = rough[_rows_of(region, attention).any(-1)]
    # A norm has a gradient at 0, too.
    return torch.linalg.vector_norm(rough) * rough.numel() ** -0.5


def _rows_of(region: Tensor, attention: Tensor) -> Tensor:
    """A region `[F, h, w]` as bool `[S, F]` of attention `[B, H, S, F, F]`.

    Raises:
        ValueError: another region than of this attention, or one without a token.
    """
    places, frames = attention.shape[2:4]
    if region.dtype != torch.bool or region.ndim != 3 or region.flatten(1).shape != (frames, places):
        raise ValueError(
            f"region must be bool [F, h, w] of {frames} frames of {places} tokens, got {region.dtype} "
            f"{list(region.shape)}"
        )
    if not bool(region.any()):
        raise ValueError("region holds no token; give one with at least one")
    return region.flatten(1).T.to(attention.device)
