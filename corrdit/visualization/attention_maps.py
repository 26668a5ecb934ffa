"""Maps over the tokens of frames drawn over the frames themselves: attention, similarity, principal components."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from corrdit.video import resize_frame

_FADE = 0.9
_RING, _CROSS, _EDGE = (255, 255, 255), (0, 229, 255), (20, 20, 20)
_MARK = 6.0
"""Radius of a ring and length of a cross's arms, in pixels."""


def draw_attention_maps(
    frames: np.ndarray,
    maps: np.ndarray,
    *,
    size: tuple[int, int],
    query: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    gain: float = 1.0,
) -> list[np.ndarray]:
    """Lay weights over darkened frames: the larger, the brighter the colour.

    Each frame is scaled by itself, from its smallest weight to its largest.

    Args:
        frames: uint8 `[F, H, W, 3]`.
        maps: float `[F, h, w]`.
        size: (height, width) of the pictures in pixels.
        query: (x, y) of the asking point in pixels of the first frame, drawn as a ring.
        truth: `[F, 2]` true (x, y) in every frame, drawn as a cross; NaN where it is hidden.
        gain: power the scaled weights are raised to; below 1 shows small ones.

    Returns:
        F pictures uint8 `[height, width, 3]`.

    Raises:
        ValueError: as many maps as frames are needed.
    """
    if len(frames) != len(maps) or maps.ndim != 3:
        raise ValueError(f"{len(frames)} frames need maps [{len(frames)}, h, w], got {list(maps.shape)}")
    from matplotlib import colormaps

    pictures = []
    for index, (frame, weights) in enumerate(zip(frames, np.asarray(maps, dtype=np.float64), strict=True)):
        low, high = weights.min(), weights.max()
        share = (weights - low) / max(high - low, 1e-12)
        # Bilinear between token centres.
        share = F.interpolate(torch.from_numpy(share**gain)[None, None], size, mode="bilinear")[0, 0].numpy()[..., None]
        grey = resize_frame(frame, *size).astype(np.float64).mean(-1, keepdims=True).repeat(3, -1) * _FADE
        colour = 255 * colormaps["inferno"](share[..., 0])[..., :3]
        picture = grey * (1 - 0.75 * share) + colour * (0.25 + 0.75 * share) * (0.35 + 0.65 * share)
        scale = np.array(size[::-1]) / np.array(frame.shape[1::-1])
        marks = []
        if query is not None and index == 0:
            marks.append((np.asarray(query) * scale, "ring"))
        if truth is not None and index > 0 and np.isfinite(truth[index]).all():
            marks.append((np.asarray(truth[index]) * scale, "cross"))
        pictures.append(_marked(picture.clip(0, 255).astype(np.uint8), marks))
    return pictures


def draw_components(components: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Three principal components `[F, h, w, 3]` in 0 to 1 as red, green and blue: F pictures, tokens as blocks."""
    if components.ndim != 4 or components.shape[-1] != 3:
        raise ValueError(f"components must be [frames, height, width, 3], got {list(components.shape)}")
    row = (np.arange(size[0]) * components.shape[1]) // size[0]
    column = (np.arange(size[1]) * components.shape[2]) // size[1]
    pixels = (255 * np.asarray(components, dtype=np.float64).clip(0, 1) + 0.5).astype(np.uint8)
    return [np.ascontiguousarray(picture[row][:, column]) for picture in pixels]


def _marked(picture: np.ndarray, marks: list[tuple[np.ndarray, str]]) -> np.ndarray:
    """Rings and crosses with a dark edge at (x, y) in pixels, anti-aliased."""
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    drawn = picture.astype(np.float64)
    for place, kind in marks:
        across, down = x - place[0], y - place[1]
        if kind == "ring":
            distance = np.abs(np.hypot(across, down) - _MARK)
        else:
            arms = ((np.abs(across), np.abs(down)), (np.abs(down), np.abs(across)))
            distance = np.minimum(*(np.hypot(thin, np.maximum(along - _MARK, 0)) for thin, along in arms))
        for colour, width in ((_EDGE, 2.2), (_RING if kind == "ring" else _CROSS, 1.1)):
            cover = np.clip(width + 0.5 - distance, 0, 1)[..., None]
            drawn += cover * (np.array(colour) - drawn)
    return (drawn + 0.5).astype(np.uint8)
