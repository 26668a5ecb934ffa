"""What pictures of one layer and step are drawn from: attention rows, similar features, principal components."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit import ops
from corrdit.analysis.point_readings import Stride, point_tokens
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.grid import TokenGrid


class AttentionPicture(NamedTuple):
    """Maps of one layer, float32 on the CPU.

    Attributes:
        rows: `[P, F, h, w]` query-key cost of chosen points in every frame, mean over heads.
        queries, keys: `[F, h, w, 3]` first three principal components over all video tokens, 0 to 1.
    """

    rows: Tensor
    queries: Tensor
    keys: Tensor


class FeaturePicture(NamedTuple):
    """Maps of the features of one layer, float32 on the CPU.

    Attributes:
        rows: `[P, F, h, w]` cosine similarity with chosen points, -1 to 1.
        components: `[F, h, w, 3]` first three principal components, 0 to 1.
    """

    rows: Tensor
    components: Tensor


def attention_picture(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    key_mask: Tensor | None,
    *,
    points: Tensor,
    stride: Stride,
    options: AnalysisOptions,
) -> AttentionPicture:
    """Maps from queries and keys.

    Args:
        q, k, grid, key_mask: as an operation is given them, one video.
        points: `[P, 2]` (x, y) in pixels of the encoded first frame.
        stride: (dy, dx) pixels a token spans.
        options: `bidirectional`, `backend` and `memory_budget` are used.
    """
    tokens = point_tokens(points, grid, stride, "nearest")
    both = options.bidirectional
    rows = ops.cost_rows(q, k, grid, tokens, bidirectional=both, key_mask=key_mask, **options.execution)
    maps = (grid.frames, grid.height, grid.width)
    parts = [principal_components(part[0, :, grid.video_slice].transpose(0, 1).flatten(1)) for part in (q, k)]
    return AttentionPicture(rows[0].cpu(), *(part.unflatten(0, maps) for part in parts))


def feature_picture(features: Tensor, grid: TokenGrid, *, points: Tensor, stride: Stride) -> FeaturePicture:
    """Maps from the features `[1, F*S, C]` of the video tokens; points as for `attention_picture`."""
    maps = (grid.frames, grid.height, grid.width)
    unit = F.normalize(features[0].float(), dim=-1)
    rows = unit[point_tokens(points, grid, stride, "nearest").to(unit.device)] @ unit.T
    return FeaturePicture(rows.unflatten(-1, maps).cpu(), principal_components(features[0]).unflatten(0, maps))


def principal_components(vectors: Tensor, count: int = 3) -> Tensor:
    """The first components of vectors `[N, C]`, each spread from 0 (2nd percentile) to 1 (98th): `[N, count]`.

    A component's sign is chosen so that its largest weight is positive. Missing ones (C below `count`) are 0.5.
    """
    centred = vectors.detach().float().cpu()
    centred = centred - centred.mean(0)
    kept = min(count, *centred.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.pca_lowrank(centred, q=min(kept + 4, *centred.shape), center=False)
    axes = axes[:, :kept]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = centred @ axes
    low, high = torch.quantile(values, 0.02, dim=0), torch.quantile(values, 0.98, dim=0)
    spread = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return F.pad(spread, (0, count - kept), value=0.5)
