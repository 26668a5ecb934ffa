"""DiffTrack's confidence and attention scores as its released code computes them, point by point.

Source: DiffTrack, "Emergent Temporal Correspondences from Video Diffusion Transformers" (arXiv 2506.17220), confidence
score and attention score, and the code released with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit import ops
from corrdit.analysis.point_readings import point_tokens
from corrdit.grid import TokenGrid


def released_scores(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    points: Tensor,
    visibility: Tensor,
    size: tuple[int, int] = (480, 720),
) -> dict[str, Tensor]:
    """Confidence (largest weight) and attention (summed weight) on the text, the own and the other frames.

    What the released code does, all of it kept:

    - The token of a point is `round(x / dx), round(y / dy)`, x cut off at the *height* and y at the *width* of the
      token grid, and used as (row, column): transposed.
    - The weights are the mean over heads of the softmax over text and all frames.
    - Confidence in the text and in the own frame is over all points. In the other frames it is, for each point, the
      mean over the latent frames of which all video frames show the point (four frames to a latent), and 0 for a
      point that is never shown so. All points of the grid are in the mean, those hidden in the first frame too.
    - Attention is over the points visible in the first frame alone.

    Args:
        q, k: `[1, H, N, D]`, text tokens included, of the conditional branch.
        grid: of the N tokens, F frames.
        points: float `[P, 2]` (x, y) in pixels of the first frame.
        visibility: bool `[T, P]` or `[1, T, P]` in the T video frames, where T - 1 is a multiple of F - 1.
        size: (height, width) of the video in pixels.

    Returns:
        Float32 tensors (float64 for float64 input) on the CPU: `confidence_text_points`, `confidence_self_points`,
        `confidence_cross_points` `[P]`, `attention_text_points`, `attention_self_points`, `attention_cross_points` over
        the points visible in the first frame, and the mean of each under its name without `_points`.

    Raises:
        ValueError: a batch of several videos, a grid of one frame, or points, visibility or a size that do not fit.
    """
    points, visible, stride = _checked(q, grid, points, visibility, size)
    mass = ops.attention_mass(q, k, grid, point_tokens(points, grid, stride, "released"))
    text, frames, text_peak, frame_peak = (part[0].cpu() for part in mass)
    start = visible[0]
    shown = visible[1:].unflatten(0, (grid.frames - 1, -1)).all(1).T
    scores = {
        "confidence_text": text_peak,
        "confidence_self": frame_peak[:, 0],
        "confidence_cross": mean_where_shown(frame_peak[:, 1:], shown),
        "attention_text": text[start],
        "attention_self": frames[start, 0],
        "attention_cross": frames[start, 1:].sum(-1),
    }
    means = {name: values.mean() for name, values in scores.items()}
    return {**{f"{name}_points": values for name, values in scores.items()}, **means}


def mean_where_shown(values: Tensor, shown: Tensor) -> Tensor:
    """The mean over the last axis of `[..., P, F]` where bool `[P, F]` says so, `[..., P]`; 0 where it never does."""
    return (values * shown).sum(-1) / shown.sum(-1).clamp(min=1)


def _checked(
    q: Tensor, grid: TokenGrid, points: Tensor, visibility: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Points, visibility `[T, P]` and the (dy, dx) pixels of a token."""
    points, visible = torch.as_tensor(points).float().cpu(), torch.as_tensor(visibility).cpu()
    visible = visible[0] if visible.ndim == 3 and len(visible) == 1 else visible
    if q.ndim != 4 or len(q) != 1 or grid.frames < 2:
        raise ValueError(f"q must be [1, H, N, D] of at least two frames, got {list(q.shape)} of {grid.frames} frames")
    if points.ndim != 2 or points.shape[1] != 2 or not bool(torch.isfinite(points).all()):
        raise ValueError(f"points must be finite [P, 2] (x, y) in pixels, got {list(points.shape)}")
    if visible.dtype != torch.bool or visible.ndim != 2 or visible.shape[1] != len(points):
        raise ValueError(
            f"visibility must be boolean [T, {len(points)}], one column a point, got {visible.dtype} "
            f"{list(visible.shape)}"
        )
    if len(visible) < grid.frames or (len(visible) - 1) % (grid.frames - 1):
        raise ValueError(
            f"visibility has {len(visible)} video frames, which are not 1 and a multiple of {grid.frames - 1} for "
            f"{grid.frames} frames of tokens"
        )
    height, width = size
    if height % grid.height or width % grid.width:
        raise ValueError(
            f"size {height} x {width} (height x width) is no whole number of pixels for each of {grid.height} x "
            f"{grid.width} tokens"
        )
    return points, visible, (height // grid.height, width // grid.width)
