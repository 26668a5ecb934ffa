"""Between pixels and tokens, and reading maps of a frame's tokens at points between them.

Two conventions are offered by name everywhere:

`"centers"` (ours). Pixel coordinates are continuous with the origin at the frame's top left corner. Token (row,
column) covers `[column * dx, (column + 1) * dx] x [row * dy, (row + 1) * dy]`; its centre lies at
`((column + 0.5) * dx, (row + 0.5) * dy)`. A token position is continuous too, whole numbers being centres, so
`token = pixel / stride - 0.5`. A map is read by bilinear interpolation of *displacements* between token centres:
between the outermost centre and the border the displacement of the outermost token holds, so that a point on the
border that does not move is left where it is.

`"released"` (DiffTrack's code, for parity). A map of h x w tokens is read at column `x / dx / (w - w / 64) * (w - 1)`
and row `y / dy / (h - w / 64) * (h - 1)`: the margin w / 64 of its starting grid is taken from the *width* on both
axes. Absolute positions are interpolated, and token t is taken for pixel `stride * t`, without the half token. Both
together are off by up to half a token. Beyond the last token, in the margin, what is read fades to position 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

GEOMETRIES = ("centers", "released")
PADDINGS = ("border", "zeros")
RELEASED_MARGIN = 64

Stride = float | tuple[float, float]


def tokens_to_pixels(tokens: torch.Tensor, stride: Stride, *, geometry: str = "centers") -> torch.Tensor:
    """Pixel coordinates of token positions.

    Args:
        tokens: `[..., 2]` (x = column, y = row), continuous.
        stride: pixels a token spans, one number or (dy, dx).
        geometry: "centers" gives `(token + 0.5) * stride`, "released" gives `token * stride`.

    Returns:
        Float `[..., 2]` (x, y) in pixels.

    Raises:
        ValueError: a last axis other than 2, a stride that is not positive, an unknown geometry.
    """
    tokens = _real_points("tokens", tokens)
    pixels_per_token = _stride_xy(stride, tokens)
    if _checked(geometry) == "released":
        return tokens * pixels_per_token
    return (tokens + 0.5) * pixels_per_token


def pixels_to_tokens(
    points: torch.Tensor,
    stride: Stride,
    *,
    geometry: str = "centers",
    grid_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The continuous token position at which a map is read for a point in pixels.

    Args:
        points: `[..., 2]` (x, y) in pixels.
        stride: pixels a token spans, one number or (dy, dx).
        geometry: "centers" is the inverse of `tokens_to_pixels`; "released" is DiffTrack's reading position, which is
            not, and needs `grid_size`.
        grid_size: (h, w) tokens of a frame.

    Returns:
        Float `[..., 2]` (x = column, y = row); not clamped to the frame.

    Raises:
        ValueError: as `tokens_to_pixels`, or "released" without `grid_size`.
    """
    points = _real_points("points", points)
    position = points / _stride_xy(stride, points)
    if _checked(geometry) == "centers":
        return position - 0.5
    if grid_size is None:
        raise ValueError('geometry="released" reads positions relative to the map: give grid_size=(height, width)')
    height, width = grid_size
    margin = width / RELEASED_MARGIN
    extent = points.new_tensor((width - margin, height - margin))
    return position / extent * points.new_tensor((width - 1, height - 1))


def bilinear_tokens(
    tokens: torch.Tensor, grid_size: tuple[int, int], *, padding: str = "border"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four tokens around each position and their bilinear weights.

    Args:
        tokens: `[..., P, 2]` (x = column, y = row), continuous.
        grid_size: (h, w) tokens of a frame.
        padding: positions beyond the outermost token centres are clamped to them ("border"), or blend with zeros
            ("zeros").

    Returns:
        indices int64 `[..., P, 4]`, flat (row * w + column), and weights `[..., P, 4]`, which sum to one (to less
        outside with "zeros").

    Raises:
        ValueError: a last axis other than 2, NaN, an empty grid, an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(map(repr, PADDINGS))}, got {padding!r}")
    height, width = _checked_size(grid_size)
    tokens = _real_points("tokens", tokens)
    if not bool(torch.isfinite(tokens).all()):
        raise ValueError("tokens holds positions that are NaN or infinite; all must be finite")
    last = tokens.new_tensor((width - 1, height - 1))
    outside = tokens.new_tensor(0.0 if padding == "border" else 1.0)
    position = torch.minimum(tokens.maximum(-outside), last + outside)
    low = position.floor()
    corners = low.unsqueeze(-2) + low.new_tensor(((0, 0), (1, 0), (0, 1), (1, 1)))
    weights = (1 - (position.unsqueeze(-2) - corners).abs()).prod(-1)
    inside = ((corners >= 0) & (corners <= last)).all(-1)
    column, row = torch.minimum(corners.clamp(min=0), last).long().unbind(-1)
    return row * width + column, weights * inside


def nearest_tokens(tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Flat index (row * w + column), int64 `[..., P]`, of the token nearest to each position `[..., P, 2]`."""
    height, width = _checked_size(grid_size)
    tokens = _real_points("tokens", tokens)
    column = (tokens[..., 0] + 0.5).floor().long().clamp(0, width - 1)
    row = (tokens[..., 1] + 0.5).floor().long().clamp(0, height - 1)
    return row * width + column


def sample_map(values: torch.Tensor, tokens: torch.Tensor, *, padding: str = "border") -> torch.Tensor:
    """Bilinear reading of a map over the tokens of a frame.

    Args:
        values: float `[..., h, w, C]`.
        tokens: `[P, 2]` for all maps alike or `[..., P, 2]` with the leading axes of `values` (broadcast); (x = column,
            y = row), continuous.
        padding: as `bilinear_tokens` takes it.

    Returns:
        `[..., P, C]`; differentiable in `values`.
    """
    if values.ndim < 3 or not values.is_floating_point():
        raise ValueError(
            "values must be floating-point numbers [..., height, width, channels], "
            f"got {values.dtype} {list(values.shape)}"
        )
    height, width, channels = values.shape[-3:]
    indices, weights = bilinear_tokens(tokens, (height, width), padding=padding)
    flat = values.flatten(-3, -2)
    if tokens.ndim == 2:
        corners = flat[..., indices, :]
    else:
        indices = indices.expand(*flat.shape[:-2], *indices.shape[-2:])
        chosen = indices.flatten(-2).unsqueeze(-1).expand(*flat.shape[:-2], -1, channels)
        corners = flat.gather(-2, chosen).unflatten(-2, tuple(indices.shape[-2:]))
    return (corners * weights.to(values.dtype).unsqueeze(-1)).sum(-2)


def sample_matches(
    match_xy: torch.Tensor, points: torch.Tensor, stride: Stride, *, geometry: str = "centers"
) -> torch.Tensor:
    """Where points of the source frame go, read from a map of matches.

    Args:
        match_xy: float `[..., h, w, 2]`: for each source token the (x, y) token position of its match in a target
            frame, as `ops.match` gives it (`[B, Ft, h, w, 2]`).
        points: `[P, 2]` for all maps alike, or `[..., P, 2]` broadcast with the leading axes; (x, y) in pixels of the
            source frame.
        stride: pixels a token spans, one number or (dy, dx).
        geometry: "centers" or "released"; the module's docstring says what each does.

    Returns:
        `[..., P, 2]`, (x, y) in pixels of the target frames.

    Raises:
        ValueError: shapes that do not fit, an unknown geometry, a stride that is not positive.
    """
    if match_xy.ndim < 3 or match_xy.shape[-1] != 2:
        raise ValueError(f"match_xy must have shape [..., height, width, 2], got {list(match_xy.shape)}")
    height, width = match_xy.shape[-3:-1]
    points = _real_points("points", points).to(match_xy.device)
    if points.ndim < 2:
        raise ValueError(f"points must have shape [points, 2] or [..., points, 2], got {list(points.shape)}")
    position = pixels_to_tokens(points, stride, geometry=geometry, grid_size=(height, width))
    if geometry == "released":
        return tokens_to_pixels(sample_map(match_xy, position, padding="zeros"), stride, geometry=geometry)
    row, column = torch.meshgrid(
        torch.arange(height, device=match_xy.device, dtype=match_xy.dtype),
        torch.arange(width, device=match_xy.device, dtype=match_xy.dtype),
        indexing="ij",
    )
    displacement = sample_map(match_xy - torch.stack((column, row), -1), position)
    return tokens_to_pixels(position + displacement, stride, geometry=geometry)


def _checked(geometry: str) -> str:
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry must be one of {', '.join(map(repr, GEOMETRIES))}, got {geometry!r}")
    return geometry


def _checked_size(grid_size: tuple[int, int]) -> tuple[int, int]:
    height, width = grid_size
    if height < 1 or width < 1:
        raise ValueError(f"grid_size must be (height, width) of at least one token each, got {grid_size}")
    return height, width


def _real_points(name: str, points: torch.Tensor) -> torch.Tensor:
    if not isinstance(points, torch.Tensor):
        points = torch.as_tensor(points)
    if points.ndim < 1 or points.shape[-1] != 2 or points.is_complex() or points.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers [..., 2] as (x, y), got {points.dtype} {list(points.shape)}")
    return points if points.is_floating_point() else points.to(torch.float32)


def _stride_xy(stride: Stride, like: torch.Tensor) -> torch.Tensor:
    """(dx, dy) as a tensor, from one number or (dy, dx)."""
    pair = tuple(stride) if isinstance(stride, Sequence) else (stride, stride)
    if len(pair) != 2 or not all(float(size) > 0 for size in pair):
        raise ValueError(f"stride must be a positive number or a pair (dy, dx) of them, in pixels, got {stride!r}")
    return like.new_tensor((float(pair[1]), float(pair[0])))
