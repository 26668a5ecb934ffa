"""How often the match of a point is near where the point really went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from corrdit.geometry import Stride, sample_matches


@dataclass(frozen=True)
class MatchingHits:
    """Counts that can be added over videos.

    Args:
        hits: matches nearer than each threshold.
        cases: matches looked at.
    """

    hits: tuple[int, ...]
    cases: int

    def __add__(self, other: MatchingHits) -> MatchingHits:
        pairs = zip(self.hits, other.hits, strict=True)
        return MatchingHits(tuple(one + another for one, another in pairs), self.cases + other.cases)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share of hits for each threshold; NaN without cases."""
        return tuple(count / self.cases if self.cases else float("nan") for count in self.hits)


def matching_hits(
    match_xy: torch.Tensor,
    tracks: torch.Tensor,
    visible: torch.Tensor,
    *,
    source: int,
    stride: Stride,
    thresholds: Sequence[float] = (1.0,),
    least_motion: float = 0.0,
) -> MatchingHits:
    """Count the points whose match lies near their true place (percentage of correct keypoints, as counts).

    A case is a point and a target frame where the point is visible in both the source and the target frame and moved by
    more than `least_motion`. Points that stand still are matched well by a map that never moves, so figures on all
    points say little.

    Args:
        match_xy: `[F - 1, h, w, 2]`, match of each source token in every other frame in order, (x, y) in tokens, as
            `ops.match` gives it.
        tracks: `[F, P, 2]`, true (x, y) in pixels in the frames of the grid.
        visible: bool `[F, P]`.
        source: the source frame.
        stride: pixels a token spans, one number or (dy, dx).
        thresholds: largest distances of a hit, in tokens.
        least_motion: in tokens, exceeded by the points that count.

    Raises:
        ValueError: shapes that do not fit together, a source frame outside.
    """
    frames = tracks.shape[0]
    if tracks.ndim != 3 or tracks.shape[2] != 2 or visible.shape != tracks.shape[:2] or visible.dtype != torch.bool:
        raise ValueError(
            "tracks must be [frames, points, 2] and visible boolean [frames, points], got "
            f"{list(tracks.shape)} and {visible.dtype} {list(visible.shape)}"
        )
    if match_xy.ndim != 4 or match_xy.shape[0] != frames - 1:
        raise ValueError(
            f"match_xy must be [{frames - 1} target frames, height, width, 2] for tracks of {frames} frames, "
            f"got {list(match_xy.shape)}"
        )
    if not 0 <= source < frames:
        raise ValueError(f"source frame {source} is outside 0 to {frames - 1}")
    targets = [frame for frame in range(frames) if frame != source]
    tracks = tracks.to(match_xy.device, match_xy.dtype)
    pixels = tracks.new_tensor((stride, stride) if isinstance(stride, (int, float)) else (stride[1], stride[0]))
    found = sample_matches(match_xy, tracks[source], stride)
    moved = ((tracks[targets] - tracks[source]) / pixels).norm(dim=-1)
    error = ((found - tracks[targets]) / pixels).norm(dim=-1)
    visible = visible.to(match_xy.device)
    cases = visible[targets] & visible[source] & (moved > least_motion if least_motion > 0 else moved >= 0)
    return MatchingHits(tuple(int((cases & (error <= threshold)).sum()) for threshold in thresholds), int(cases.sum()))
