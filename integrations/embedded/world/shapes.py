"""Outlines of sprites as signed distances, negative inside, in a local frame whose outline has radius about one.

The distances are exact for the disc, ring, square and diamond and bounds for the others; only their sign and their
slope near the outline are used (coverage of a pixel and occlusion). Formulas follow Quilez, "2D distance functions".
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: the plane is folded into one half point, whose edge runs from the tip to the inner corner."""
    radius, sector = torch.hypot(x, y), 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    px, py = radius * torch.cos(folded), radius * torch.sin(folded)
    inner_x, inner_y = 0.5 * math.cos(sector / 2), 0.5 * math.sin(sector / 2)
    edge_x, edge_y = inner_x - 1.05, inner_y
    length = math.hypot(edge_x, edge_y)
    return ((px - 1.05) * edge_y - py * edge_x) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    px, py = x.abs() / 1.6, 0.55 - y / 1.6
    lobe = torch.hypot(px - 0.25, py - 0.75) - math.sqrt(2.0) / 4
    diagonal = 0.5 * (px + py).clamp(min=0)
    below = torch.minimum(torch.hypot(px, py - 1.0), torch.hypot(px - diagonal, py - diagonal)) * torch.sign(px - py)
    return torch.where(px + py > 1.0, lobe, below) * 1.6


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.92,
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "triangle": lambda x, y: torch.maximum((math.sqrt(3.0) * x.abs() - (y + 1.0)) / 2, y - 0.7),
    "star": _star,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.3,
    "diamond": lambda x, y: (x.abs() + 0.8 * y.abs() - 0.85) / math.hypot(1.0, 0.8),
    "cross": lambda x, y: torch.minimum(_box(x, y, 1.0, 0.4), _box(x, y, 0.4, 1.0)),
    "heart": _heart,
}
SHAPES = tuple(_DISTANCES)


def signed_distance(local: Tensor, shapes: Sequence[str]) -> Tensor:
    """Signed distance of points to their sprite's outline, in units of the sprite's radius.

    local: [N, ..., 2] points in the local frame (x right, y down) of N sprites; shapes: of each, one of SHAPES.
    Returns [N, ...] in the dtype of `local`.
    """
    distance = torch.empty_like(local[..., 0])
    for name in set(shapes):
        chosen = [index for index, shape in enumerate(shapes) if shape == name]
        distance[chosen] = _DISTANCES[name](*local[chosen].unbind(-1))
    return distance
