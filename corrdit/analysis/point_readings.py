"""What one attention layer says about chosen points: where they go, and what they attend to."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit import ops
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.geometry import nearest_tokens, pixels_to_tokens, sample_matches
from corrdit.grid import TokenGrid
from corrdit.tracking.filtering import low_pass
from corrdit.tracking.released_costs import bfloat16_matches

Stride = tuple[int, int]


class AttentionReading(NamedTuple):
    """Query-key matching and attention of P points of the first frame, for the mean over heads and then each head.

    Attributes:
        positions: `[1 + H + n, F - 1, P, 2]` (x, y) in pixels of the encoded frames, in every later frame of the grid:
            the mean over heads, each head (H is 0 without heads apart), the mean through each of n low-pass filters.
        text: `[1 + H, P]` summed attention on the text.
        frames: `[1 + H, P, F]` summed attention on each frame.
        text_peak: `[1 + H, P]` largest single weight in the text.
        frame_peak: `[1 + H, P, F]` largest single weight in each frame.
    """

    positions: Tensor
    text: Tensor
    frames: Tensor
    text_peak: Tensor
    frame_peak: Tensor


def read_attention(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    key_mask: Tensor | None,
    *,
    points: Tensor,
    stride: Stride,
    options: AnalysisOptions,
) -> AttentionReading:
    """Match points by queries and keys, and sum up their attention.

    Source: DiffTrack (arXiv 2506.17220), query-key matching, attention score and confidence score.

    Args:
        q, k: `[1, H, N, D]`, text included.
        grid: of the N tokens.
        key_mask: bool `[1, N]` or None.
        points: `[P, 2]` (x, y) in pixels of the encoded first frame.
        stride: (dy, dx) pixels a token spans.
        options: see `AnalysisOptions`.

    Returns:
        An `AttentionReading` on the CPU.

    Raises:
        ValueError: a batch of several videos, a single frame, or queries or keys that are NaN or infinite.
    """
    _check("queries", q, grid)
    _check("keys", k, grid)
    tokens = point_tokens(points, grid, stride, options.token_choice)
    kinds = ("probabilities", "none") if options.per_head else ("probabilities",)
    positions, masses = [], []
    for heads in kinds:
        found = _matches(q, k, grid, key_mask, heads, options)
        positions.append(sample_matches(found, points.to(found), stride, geometry=options.geometry).cpu())
        mass = ops.attention_mass(q, k, grid, tokens, heads=heads, key_mask=key_mask, **options.execution)
        masses.append([part.cpu() if heads == "probabilities" else part[0].cpu() for part in mass])
    video = grid.video_slice
    plain = replace(options, rounding="none")
    video_mask = None if key_mask is None else key_mask[:, video]
    for spread in options.low_pass:
        smooth_q, smooth_k = (low_pass(tensor[:, :, video], grid.without_text(), spread) for tensor in (q, k))
        found = _matches(smooth_q, smooth_k, grid.without_text(), video_mask, "probabilities", plain)
        positions.append(sample_matches(found, points.to(found), stride, geometry=options.geometry).cpu())
    return AttentionReading(torch.cat(positions), *(torch.cat(parts) for parts in zip(*masses, strict=True)))


def read_features(
    features: Tensor, grid: TokenGrid, *, heads: int, points: Tensor, stride: Stride, options: AnalysisOptions
) -> Tensor:
    """Match points by the features of the video tokens: the most similar token of each later frame.

    Args:
        features: `[1, F*S, C]` of the video tokens.
        grid: of the forward.
        heads: a divisor of C; the similarity is summed over this many parts.
        points, stride, options: as for `read_attention`.

    Returns:
        `[1, F - 1, P, 2]` (x, y) in pixels, on the CPU.

    Raises:
        ValueError: as `read_attention`.
    """
    grid = grid.without_text()
    _check("features", features, grid)
    features = features.float()
    if options.similarity == "cosine":
        features = F.normalize(features, dim=-1)
    if options.rounding == "none":
        folded = features.unflatten(-1, (heads, -1)).transpose(1, 2)
        found = ops.match(folded, folded, grid, heads="logits", bidirectional=False, scale=1.0, **options.execution).xy
    else:
        whole = features.unsqueeze(1)
        found = bfloat16_matches(whole, whole, grid, scale=1.0, bidirectional=False)
    return sample_matches(found, points.to(found), stride, geometry=options.geometry).cpu()


def point_tokens(points: Tensor, grid: TokenGrid, stride: Stride, choice: str) -> Tensor:
    """Flat token int64 `[P]` of the first frame that each point `[P, 2]` (x, y) in pixels stands for."""
    if choice == "nearest":
        return nearest_tokens(pixels_to_tokens(points, stride), (grid.height, grid.width))
    # Released: x is clipped by the height and used as the row, y by the width and used as the column.
    row = (points[:, 0] / stride[1]).round().long().clamp(0, grid.height - 1)
    column = (points[:, 1] / stride[0]).round().long().clamp(0, grid.width - 1)
    return row * grid.width + column


def _matches(
    q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, heads: str, options: AnalysisOptions
) -> Tensor:
    """`[M, F - 1, h, w, 2]` matches of the first frame's tokens by the mean over heads or by each head."""
    both = options.bidirectional
    if options.rounding == "none":
        found = ops.match(q, k, grid, heads=heads, bidirectional=both, key_mask=key_mask, **options.execution).xy
        return found if heads == "probabilities" else found[0]
    count = q.shape[1] if heads == "probabilities" else 1
    parts = zip(q.split(count, 1), k.split(count, 1), strict=True)
    return torch.cat(
        [bfloat16_matches(one, other, grid, bidirectional=both, key_mask=key_mask) for one, other in parts]
    )


def _check(name: str, tensor: Tensor, grid: TokenGrid) -> None:
    if tensor.shape[0] != 1:
        raise ValueError(f"the analysis reads one video at a time, got a batch of {tensor.shape[0]}")
    if grid.frames < 2:
        raise ValueError("the analysis needs at least two latent frames to match between, got one; give a longer video")
    if not bool(torch.isfinite(tensor).all()):
        broken = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"the {name} hold {broken} numbers that are NaN or infinite; check latents and precision")
