"""From readings and true tracks to counts and sums that add up over videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.point_readings import AttentionReading, Stride
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.analysis.released_scores import mean_where_shown
from corrdit.tracking.tracks import interpolate_tracks


@dataclass(frozen=True, eq=False)
class TrueTracks:
    """Where points really go, at the size the video is encoded.

    Args:
        xy: float `[T, P, 2]`, (x, y) in pixels of the encoded frames; the place in frame 0 is the query.
        visible: bool `[T, P]`.
        frame_map: for each latent frame the video frames it stands for.
        starts: float `[P, 2]`, the queries in place of the positions in frame 0.

    Raises:
        ValueError: shapes that do not fit together, numbers that are not finite where a point is visible, no point
            visible in the first frame and in another.
    """

    xy: Tensor
    visible: Tensor
    frame_map: tuple[tuple[int, ...], ...]
    starts: Tensor | None = None

    def __post_init__(self) -> None:
        xy, visible = torch.as_tensor(self.xy).float(), torch.as_tensor(self.visible)
        if xy.ndim != 3 or xy.shape[2] != 2 or visible.shape != xy.shape[:2] or visible.dtype != torch.bool:
            raise ValueError(
                "true tracks must be xy [frames, points, 2] and visible boolean [frames, points], got "
                f"{list(xy.shape)} and {visible.dtype} {list(visible.shape)}"
            )
        if not bool(torch.isfinite(xy[visible]).all()):
            raise ValueError("true tracks hold positions that are NaN or infinite where a point is visible")
        if not bool((visible[0] & visible[1:].any(0)).any()):
            raise ValueError("no point is visible both in the first frame and in another one, so nothing can be scored")
        frames = sorted(frame for group in self.frame_map for frame in group)
        if frames != list(range(len(xy))):
            raise ValueError(f"the frame map names the frames {frames}, but the tracks have frames 0 to {len(xy) - 1}")
        object.__setattr__(self, "xy", torch.nan_to_num(xy))
        object.__setattr__(self, "visible", visible)
        if self.starts is not None:
            starts = torch.as_tensor(self.starts).float()
            if starts.shape != xy.shape[1:]:
                raise ValueError(f"starts must be [{xy.shape[1]}, 2], one for each point, got {list(starts.shape)}")
            object.__setattr__(self, "starts", starts)

    @property
    def queries(self) -> Tensor:
        """`[P, 2]` places in the first frame from which points are matched."""
        return self.xy[0] if self.starts is None else self.starts


class MatchCounts(NamedTuple):
    """Counts of R readings; `moving` ones of points that moved by more than the least motion alone.

    Attributes:
        hits: int64 `[R, K]` positions within each of K thresholds.
        moving_hits: int64 `[R, K]`.
        cases: positions looked at.
        moving_cases: likewise.
    """

    hits: np.ndarray
    moving_hits: np.ndarray
    cases: int
    moving_cases: int


class AttentionSums(NamedTuple):
    """Sums for the mean over heads and each head, float64 `[M]`.

    Attributes:
        confidence: largest weight of a point in a later frame, over the cases where it is visible there; or the mean of
            that over frames, over points.
        confidence_cases: how many.
        confidence_text, confidence_own: largest weight of a point in the text and in the first frame.
        point_cases: over how many points.
        text, own, cross: weight on the text, the first frame and all others, over points visible in the first frame.
        attention_cases: how many points.
    """

    confidence: np.ndarray
    confidence_cases: int
    confidence_text: np.ndarray
    confidence_own: np.ndarray
    point_cases: int
    text: np.ndarray
    own: np.ndarray
    cross: np.ndarray
    attention_cases: int


def match_counts(
    positions: Tensor, truth: TrueTracks, *, stride: Stride, thresholds: Sequence[float], options: AnalysisOptions
) -> MatchCounts:
    """Percentage of correct keypoints, as counts.

    Args:
        positions: `[R, F - 1, P, 2]` (x, y) in pixels in the latent frames after the first.
        truth: of the P points.
        stride: (dy, dx) pixels a token spans.
        thresholds: in pixels.
        options: `time`, `count_query_frame`, `count_hidden_starts` and `least_motion` are used.
    """
    queries = truth.queries.expand(len(positions), 1, -1, -1)
    tracks = video_positions(torch.cat([queries, positions.float()], dim=1), truth, options.time)
    error = (tracks - truth.xy).norm(dim=-1)
    counted = truth.visible if options.count_hidden_starts else truth.visible & truth.visible[0]
    if not options.count_query_frame:
        counted = counted.clone()
        counted[0] = False
    tokens = (truth.xy - truth.xy[0]) / torch.tensor([stride[1], stride[0]])
    moving = counted & (tokens.norm(dim=-1) > options.least_motion)
    within = torch.stack([error < threshold for threshold in thresholds], dim=1)
    return MatchCounts(
        hits=(within & counted).sum((-1, -2)).numpy(),
        moving_hits=(within & moving).sum((-1, -2)).numpy(),
        cases=int(counted.sum()),
        moving_cases=int(moving.sum()),
    )


def video_positions(tracks: Tensor, truth: TrueTracks, time: str) -> Tensor:
    """Tracks `[R, F, P, 2]` of latent frames as `[R, T, P, 2]` of video frames."""
    frames = len(truth.xy)
    if time == "released":
        return torch.as_tensor(interpolate_tracks(tracks, frames)) if tracks.shape[1] != frames else tracks
    if tracks.shape[1] == frames:
        return tracks
    centres = torch.tensor([sum(group) / len(group) for group in truth.frame_map])
    moment = torch.arange(frames).float().clamp(float(centres[0]), float(centres[-1]))
    after = torch.searchsorted(centres, moment).clamp(1, len(centres) - 1)
    share = ((moment - centres[after - 1]) / (centres[after] - centres[after - 1]))[None, :, None, None]
    return tracks[:, after - 1] * (1 - share) + tracks[:, after] * share


def attention_sums(reading: AttentionReading, truth: TrueTracks, average: str = "pooled") -> AttentionSums:
    """Confidence and attention scores, as sums.

    A frame counts towards the confidence where the point is visible in all video frames the latent frame stands
    for. With `average="pooled"` every such case of a point visible in the first frame counts the same; with
    "released" the mean over a point's frames counts, for all points, 0 for one that is never visible so. The
    attention scores are over points visible in the first frame.
    """
    start = truth.visible[0]
    shown = torch.stack([truth.visible[list(group)].all(0) for group in truth.frame_map[1:]], dim=1)
    counted, peaks = torch.ones_like(start), reading.frame_peak.double()
    if average == "released":
        confidence, cases = mean_where_shown(peaks[..., 1:], shown).sum(-1), len(start)
    else:
        counted, shown = start, shown & start[:, None]
        confidence, cases = (peaks[..., 1:] * shown).sum((-1, -2)), int(shown.sum())
    frames = reading.frames.double()
    return AttentionSums(
        confidence=confidence.numpy(),
        confidence_cases=cases,
        confidence_text=(reading.text_peak.double() * counted).sum(-1).numpy(),
        confidence_own=(peaks[..., 0] * counted).sum(-1).numpy(),
        point_cases=int(counted.sum()),
        text=(reading.text.double() * start).sum(-1).numpy(),
        own=(frames[..., 0] * start).sum(-1).numpy(),
        cross=(frames[..., 1:].sum(-1) * start).sum(-1).numpy(),
        attention_cases=int(start.sum()),
    )
