"""Tracks as a small moving drawing for a page: no video, no heavy library, nothing but the text of an SVG."""

from __future__ import annotations

import numpy as np

from corrdit.visualization.colours import position_colours

_MOST_POINTS, _MOST_FRAMES, _SIDE, _SECONDS = 64, 24, 260, 3.0


def tracks_svg(xy: np.ndarray, visible: np.ndarray) -> str:
    """At most 64 of the points and 24 of the frames: dots that move, faint where they are hidden, over their paths.

    Args:
        xy: float `[T, P, 2]`, (x, y) in pixels.
        visible: bool `[T, P]`.
    """
    frames, points = visible.shape
    rows = np.unique(np.linspace(0, frames - 1, min(frames, _MOST_FRAMES)).round().astype(int))
    chosen = np.unique(np.linspace(0, max(points - 1, 0), min(points, _MOST_POINTS)).round().astype(int))
    low, high = _extent(xy)
    scale = _SIDE / max(*(high - low), 1e-6)
    width, height = np.maximum(scale * (high - low), 1).round().astype(int)
    place = scale * (xy[rows][:, chosen] - low)
    colours = (255 * position_colours(xy[0, chosen], *(high - low)[::-1])).round().astype(int)
    drawn = []
    for path, seen, colour in zip(place.swapaxes(0, 1), visible[rows][:, chosen].T, colours, strict=True):
        ink = "#{:02x}{:02x}{:02x}".format(*colour)
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in path)
        moves = {
            "cx": [f"{x:.0f}" for x in path[:, 0]],
            "cy": [f"{y:.0f}" for y in path[:, 1]],
            "opacity": ["1" if there else ".2" for there in seen],
        }
        steps = "".join(
            f'<animate attributeName="{name}" values="{";".join(values)}" dur="{_SECONDS}s" repeatCount="indefinite"/>'
            for name, values in moves.items()
        )
        drawn.append(
            f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-opacity=".35"/>'
            f'<circle cx="{path[0, 0]:.0f}" cy="{path[0, 1]:.0f}" r="3" fill="{ink}">{steps}</circle>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'style="background:#fff;border:1px solid #ddd" role="img">{"".join(drawn)}</svg>'
    )


def _extent(xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest (x, y) with a margin; a square round the origin where there are no points."""
    if xy.size == 0:
        return np.zeros(2), np.ones(2)
    low, high = xy.min((0, 1)), xy.max((0, 1))
    margin = 0.05 * max(*(high - low), 1.0)
    return low - margin, high + margin
