"""From painted surfaces to the frames of a video: exposure, light, blur, noise and compression."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit.integrations.embedded.world.deformations import Deformation
from corrdit.integrations.embedded.world.scene import Appearance, Camera, Scene, Sprite

_MOMENTS = (-0.4, -0.2, 0.0, 0.2, 0.4)
"""At which a frame is painted, as shares of its exposure; their middle is the frame's own time."""
_OVER_TIME = {
    Camera: ("center", "angle", "zoom"),
    Sprite: ("center", "angle", "radius"),
    Deformation: ("tilt", "amplitude", "phase"),
}
Moving = TypeVar("Moving", Camera, Sprite, Deformation)


def exposures(scenes: Sequence[Scene]) -> Iterator[list[Scene]]:
    """The scenes at each moment of their frames' exposures; motion between frames is taken as straight."""
    for moment in _MOMENTS:
        yield [_later_scene(scene, moment * scene.appearance.shutter if scene.appearance else 0.0) for scene in scenes]


def _later_scene(scene: Scene, offset: float) -> Scene:
    sprites = tuple(_later(sprite, offset) for sprite in scene.sprites)
    return dataclasses.replace(scene, camera=_later(scene.camera, offset), sprites=sprites)


def _later(item: Moving, offset: float) -> Moving:
    changed: dict[str, Any] = {name: _between(getattr(item, name), offset) for name in _OVER_TIME[type(item)]}
    deformation = getattr(item, "deformation", None)
    if deformation is not None:
        changed["deformation"] = _later(deformation, offset)
    return dataclasses.replace(item, **changed)


def _between(values: np.ndarray, offset: float) -> np.ndarray:
    """Values [T, ...] so many frames later, straight between frames; the first and the last go on unchanged."""
    places = np.clip(np.arange(len(values)) + offset, 0, len(values) - 1)
    low = np.minimum(np.floor(places).astype(int), max(len(values) - 2, 0))
    high = np.minimum(low + 1, len(values) - 1)
    share = (places - low).reshape(-1, *[1] * (values.ndim - 1))
    return values[low] * (1 - share) + values[high] * share


def develop(video: Tensor, scenes: Sequence[Scene], unit: int) -> Tensor:
    """Light, blur, noise and compression on painted frames [B, T, 3, H, W], whose shorter side is `unit` pixels."""
    gain, offset = (
        torch.from_numpy(np.stack([getattr(scene, name) for scene in scenes])).float()[:, :, None, None, None]
        for name in ("gain", "offset")
    )
    video = video * gain + offset
    for index, scene in enumerate(scenes):
        if scene.appearance is not None:
            video[index] *= _light(scene.appearance, *video.shape[3:])
        sigma = scene.blur * unit
        if sigma > 0.15:
            radius = max(1, round(2.5 * sigma))
            taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
            taps = (taps / taps.sum()).expand(3, 1, 1, -1)
            padded = F.pad(video[index], (radius,) * 4, mode="replicate")
            video[index] = F.conv2d(F.conv2d(padded, taps, groups=3), taps.transpose(2, 3), groups=3)
        if scene.noise > 0:
            rng = np.random.default_rng(scene.noise_seed)
            grain = rng.standard_normal(tuple(video[index].shape), dtype=np.float32)
            video[index] += scene.noise * torch.from_numpy(grain)
    video = video.clamp(0, 1)
    for index, scene in enumerate(scenes):
        if scene.appearance is not None and scene.appearance.quality is not None:
            video[index] = _compressed(video[index], scene.appearance.quality)
    return video


def _light(appearance: Appearance, height: int, width: int) -> Tensor:
    """Gain [T, 3, H, W] of every pixel."""
    light, shade = (torch.from_numpy(getattr(appearance, name)).float() for name in ("light", "shade"))
    unit = min(height, width)
    rows = (torch.arange(height) + 0.5 - height / 2) / unit
    columns = (torch.arange(width) + 0.5 - width / 2) / unit
    slope = shade[:, 0, None, None] * columns + shade[:, 1, None, None] * rows[:, None]
    return light[:, :, None, None] * (1 + slope[:, None]).clamp(0.2, 1.8)


def _compressed(frames: Tensor, quality: int) -> Tensor:
    """Frames [T, 3, H, W] in 0..1 through JPEG."""
    from PIL import Image

    found = []
    for frame in (frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255
