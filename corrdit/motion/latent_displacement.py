"""Displacement by nearest neighbours on latents: the comparison of DiTFlow's appendix C."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit import ops
from corrdit.arguments import whole_number
from corrdit.grid import TokenGrid


def latent_displacement(latents: Tensor, *, patch: int = 1, backend: str = "auto") -> Tensor:
    """Displacement of every patch of latents to the patch of each frame that is nearest to it.

    Args:
        latents: `[F, C, h, w]`.
        patch: latents a side that form a patch; 2 gives the tokens of most video transformers.
        backend: as for `corrdit.ops.hard_displacement`.

    Returns:
        int64 (dx, dy) in patches, `[F, F, h // patch, w // patch, 2]` (from frame, to frame, row, column).

    Raises:
        ValueError: another shape, or a height or width that is not a multiple of `patch`.
    """
    patch = whole_number("patch", patch, 1)
    if latents.ndim != 4 or not latents.is_floating_point() or latents.shape[2] % patch or latents.shape[3] % patch:
        raise ValueError(
            f"latents must be floating-point [frames, channels, height, width] with sizes divisible by {patch}, got "
            f"{latents.dtype} {list(latents.shape)}"
        )
    frames, _, height, width = latents.shape
    grid = TokenGrid(frames, height // patch, width // patch)
    dtype = torch.promote_types(latents.dtype, torch.float32)
    folded = torch.nn.functional.pixel_unshuffle(latents.detach().to(dtype), patch).flatten(2)
    points = folded.transpose(1, 2).reshape(1, 1, grid.tokens, -1)
    # The nearest point p' has the largest p.p' - |p'|^2 / 2, which is one product of longer vectors.
    queries = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    keys = torch.cat([points, -0.5 * points.square().sum(-1, keepdim=True)], dim=-1)
    return ops.hard_displacement(queries, keys, grid, scale=1.0, backend=backend)[0]
