"""Query points on generated clips, and clips as annotated TAP-Vid videos."""

from __future__ import annotations

import numpy as np

from corrdit.arguments import whole_number
from corrdit.data.tapvid import TapVidVideo
from corrdit.integrations.embedded.world.clips import Clip

_CANDIDATES = 16


def sample_queries(clip: Clip, count: int, seed: int = 0) -> np.ndarray:
    """Random points of a clip, about half of them on its sprites as far as these are in view.

    count: at least 1. Returns float64 [count, 3] (frame, x, y) in pixels, at random frames. Raises ValueError for a
    count below 1 and a negative seed.
    """
    count, seed = whole_number("count", count, 1), whole_number("seed", seed, 0)
    rng = np.random.default_rng([seed, clip.scene.seed])
    config = clip.config
    candidates = rng.random((_CANDIDATES * count, 3)) * [config.frames, config.width, config.height]
    candidates[:, 0] = np.floor(candidates[:, 0])
    on_sprite = np.zeros(len(candidates), dtype=bool)
    for frame in range(config.frames):
        chosen = candidates[:, 0] == frame
        on_sprite[chosen] = clip.layers(frame, candidates[chosen, 1:]) > 0
    moving, ground = candidates[on_sprite], candidates[~on_sprite]
    from_sprites = min(len(moving), max(count // 2, count - len(ground)))
    return np.concatenate([moving[:from_sprites], ground[: count - from_sprites]])


def as_tapvid(clip: Clip, queries: np.ndarray, name: str) -> TapVidVideo:
    """The clip with the exact tracks of queries [P, 3] in the layout of TAP-Vid."""
    truth = clip.tracks(queries)
    shares = truth.xy.transpose(1, 0, 2) / np.array([clip.config.width, clip.config.height])
    return TapVidVideo(name=name, video=clip.video, points=shares, occluded=~truth.visible.T)
