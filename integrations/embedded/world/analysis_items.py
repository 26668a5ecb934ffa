"""Generated videos for an analysis of how a model matches frames."""

from __future__ import annotations

import functools

from corrdit.analysis.sources import AnalysisItem, AnalysisVideo
from corrdit.integrations.embedded.world.clips import WorldConfig, generate
from corrdit.tracking.queries import grid_points

FIRST_SEED = 2_000_000_000
"""Seeds from here on are used neither by training nor by the evaluation of checkpoints."""


def world_items(
    count: int, *, seed: int = 0, frames: int = 8, height: int = 64, width: int = 96, points: int = 16
) -> list[AnalysisItem]:
    """Generated videos with exact tracks of `points` x `points` places on the first frame.

    Raises:
        ValueError: no videos or points, or a size the world does not make.
    """
    if count < 1 or points < 1:
        raise ValueError(f"{count} videos with {points} x {points} points were asked for; at least 1 of each is needed")
    config = WorldConfig(frames, height, width)
    queries = grid_points(points, height, width)

    def load(number: int) -> AnalysisVideo:
        clip = generate([FIRST_SEED + 100_000 * seed + number], config)[0]
        truth = clip.tracks(queries)
        return AnalysisVideo(clip.video, truth.xy, truth.visible, clip.prompt)

    return [AnalysisItem(f"{number:04d}", functools.partial(load, number), "exact") for number in range(count)]
