"""FastVMT's tracking loss: what a tile's search windows hold changes little from frame to frame.

Source: FastVMT, "Eliminating Redundancy in Video Motion Transfer" (arXiv 2602.05551), in the form of its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from corrdit.arguments import whole_number
from corrdit.grid import FramePairs, TokenGrid
from corrdit.motion.flow_loss import tile_size


def tracking_loss(
    k: Tensor,
    grid: TokenGrid,
    center: Tensor,
    pairs: FramePairs,
    *,
    window: int,
    tile: int | tuple[int, int],
    region: Tensor | None = None,
) -> Tensor:
    """Mean distance between the mean keys of a tile's windows in neighbouring frames.

    Args:
        k: `[B, H, N, D]`; the loss is differentiable in it.
        grid: how the N tokens are arranged.
        center: `[B, P, h, w, 2]`, where each token's window lies, as `coarse_centers` gives it for `pairs`; that of a
            tile is its middle token's. No gradient goes through it.
        pairs: (query frame, key frame); of those with a later key frame, in order, two that follow each other are
            compared.
        window: radius in tokens; windows at the border are moved inside.
        tile: tokens a side, or rows and columns.
        region: bool `[F, h, w]` of the query frames; tiles count whose middle token is in it. None for all.

    Returns:
        Scalar, float32 (float64 for float64): the mean over tiles of the norm over all heads' channels.

    Raises:
        ValueError: pairs of which no two have the same query frame, or a region without a tile.
    """
    window, (rows, columns) = whole_number("window", window, 0), tile_size(tile)
    batch, heads, _, channels = k.shape
    radius = min(window, (min(grid.height, grid.width) - 1) // 2)
    maps = k[:, :, grid.video_slice].to(torch.promote_types(k.dtype, torch.float32))
    maps = maps.reshape(batch, heads, grid.frames, grid.height, grid.width, channels).permute(0, 2, 1, 5, 3, 4)
    means = functional.avg_pool2d(maps.flatten(0, 1).flatten(1, 2), 2 * radius + 1, stride=1)
    means = means.unflatten(0, (batch, grid.frames)).flatten(-2)  # [B, F, H * D, places]
    width = grid.width - 2 * radius
    limits = center.new_tensor([width - 1, grid.height - 2 * radius - 1])
    middle = (slice(rows // 2, None, rows), slice(columns // 2, None, columns))
    places = (center.detach()[(..., *middle, slice(None))].round() - radius).clamp(center.new_zeros(2), limits).long()
    flat = (places[..., 1] * width + places[..., 0]).flatten(2)  # [B, P, tiles]
    distances = []
    for frame in range(grid.frames):
        later = [(index, j) for index, (i, j) in enumerate(pairs) if i == frame and j > i]
        if len(later) < 2:
            continue
        held = torch.stack([means[:, j].gather(-1, _spread(flat[:, index], means)) for index, j in later])
        moved = torch.linalg.vector_norm(held[1:] - held[:-1], dim=2)  # [P - 1, B, tiles]
        distances.append(moved if region is None else moved[..., region[frame][middle].flatten().to(k.device)])
    found = torch.cat([entry.flatten() for entry in distances]) if distances else None
    if found is None or not found.numel():
        raise ValueError(
            "nothing can be tracked: no frame is compared with two later ones, or no tile's middle is in the region; "
            "take a larger span or region, or a longer video"
        )
    return found.mean()


def _spread(places: Tensor, means: Tensor) -> Tensor:
    """`[B, tiles]` as `[B, channels, tiles]`."""
    return places.unsqueeze(1).expand(-1, means.shape[2], -1)
