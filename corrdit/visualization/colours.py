"""A two-dimensional colour map: neighbours look alike, distant points do not, and none is grey.

Hue follows x and lightness follows y in OKLCH (Ottosson, "A perceptual color space for image processing", 2020), in
which equal steps look equally large; chroma is lowered only where sRGB has no such colour.
"""

from __future__ import annotations

import numpy as np

_HUE_LEFT, _HUE_RIGHT = 380.0, 95.0  # degrees: red over pink, violet, blue, cyan and green to yellow
_LIGHTNESS_TOP, _LIGHTNESS_BOTTOM = 0.84, 0.67
_CHROMA = 0.23
_LEAST_EXTENT = 0.3

_LMS_FROM_LAB = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
_RGB_FROM_LMS = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def position_colours(xy: np.ndarray, height: int, width: int) -> np.ndarray:
    """Colours of points by where they start.

    Args:
        xy: float `[P, 2]`, (x, y) in pixels.
        height, width: of the frame, in pixels. The map spans the points' own extent, but at least 30 % of the frame,
            so that points of a small object differ and a single point has a plain colour.

    Returns:
        float64 `[P, 3]`, sRGB between 0 and 1.
    """
    xy = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    if len(xy) == 0:
        return np.zeros((0, 3))
    low, high = xy.min(0), xy.max(0)
    extent = np.maximum(high - low, _LEAST_EXTENT * np.array([width, height]))
    share = np.clip((xy - (low + high - extent) / 2) / extent, 0, 1)
    hue = np.deg2rad(_HUE_LEFT + (_HUE_RIGHT - _HUE_LEFT) * share[:, 0])
    lightness = _LIGHTNESS_TOP + (_LIGHTNESS_BOTTOM - _LIGHTNESS_TOP) * share[:, 1]
    return _srgb_from_oklch(lightness, _CHROMA, hue)


def _srgb_from_oklch(lightness: np.ndarray, chroma: float, hue: np.ndarray) -> np.ndarray:
    """sRGB `[P, 3]` with the largest chroma up to `chroma` that stays inside the gamut, by bisection."""
    low, high = np.zeros_like(hue), np.full_like(hue, chroma)
    for _ in range(16):
        middle = (low + high) / 2
        linear = _linear_rgb(lightness, middle, hue)
        inside = ((linear >= 0) & (linear <= 1)).all(-1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    linear = _linear_rgb(lightness, low, hue).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _linear_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    lab = np.stack((lightness, chroma * np.cos(hue), chroma * np.sin(hue)), axis=-1)
    return (lab @ _LMS_FROM_LAB.T) ** 3 @ _RGB_FROM_LMS.T
