"""What the generated world may show beyond the plain one: photographs, bending surfaces, changing appearance.

A varied scene is the plain scene of its seed with parts exchanged, drawn from a stream of its own: the plain world,
its held-out videos included, stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrdit.arguments import finite_number
from corrdit.integrations.embedded.world.deformations import STEEPEST, Deformation
from corrdit.integrations.embedded.world.photographs import Photographs
from corrdit.integrations.embedded.world.scene import Appearance, Camera, Scene, Sprite
from corrdit.integrations.embedded.world.textures import background_images, image_side, sprite_images

PHOTOGRAPH = "photograph"
"""Name of the background and texture of photographs, in prompts too."""
_BACKGROUND_SHARE, _SPRITE_SHARE = (0.4, 1.0), (0.12, 0.6)
_WAVES = 3


@dataclass(frozen=True)
class Variety:
    """Shares from 0 to 1 of what is changed.

    videos: the share of videos that are changed at all; the others are those of the plain world.
    pictures: the share of backgrounds and of sprites that are photographs; needs `photographs`.
    bending: of surfaces that tilt, bend and wave.
    appearance: of videos with drifting light, exposure over time, compression, soft outlines and faster motion.
    Raises ValueError for other numbers, and for pictures without photographs.
    """

    videos: float = 1.0
    pictures: float = 0.0
    bending: float = 0.0
    appearance: float = 0.0
    photographs: Photographs | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("videos", "pictures", "bending", "appearance"):
            share = finite_number(name, getattr(self, name))
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, got {share}")
        if self.pictures and self.photographs is None:
            raise ValueError(
                "pictures of photographs are asked for and no photographs were given; give Photographs(folder), or "
                "--photographs DIR on the command line"
            )


def varied(scene: Scene, variety: Variety) -> Scene:
    """The scene with parts of it exchanged; its seed decides which."""
    rng = np.random.default_rng([scene.seed, 20_261])
    if rng.random() >= variety.videos:
        return scene
    changing = bool(rng.random() < variety.appearance)
    faster = float(rng.uniform(1.0, 1.8)) if changing else 1.0
    camera = _varied_camera(rng, scene.camera, variety, faster)
    sprites = tuple(_varied_sprite(rng, sprite, variety, changing, faster) for sprite in scene.sprites)
    background = PHOTOGRAPH if rng.random() < variety.pictures else scene.background
    appearance = _drawn_appearance(rng, scene.frames) if changing else None
    return dataclasses.replace(scene, camera=camera, sprites=sprites, background=background, appearance=appearance)


def _varied_camera(rng: np.random.Generator, camera: Camera, variety: Variety, faster: float) -> Camera:
    center = camera.center.mean(0) + faster * (camera.center - camera.center.mean(0))
    deformation = None
    if rng.random() < variety.bending:
        deformation = _drawn_deformation(rng, len(camera.angle), tilt=0.15, steepness=0.25, shortest=0.8)
    return dataclasses.replace(camera, center=center, deformation=deformation)


def _varied_sprite(rng: np.random.Generator, sprite: Sprite, variety: Variety, changing: bool, faster: float) -> Sprite:
    center = sprite.center.mean(0) + faster * (sprite.center - sprite.center.mean(0))
    changed: dict[str, Any] = {"center": center}
    if rng.random() < variety.bending:
        changed["deformation"] = _drawn_deformation(rng, len(center), tilt=0.35, steepness=STEEPEST, shortest=1.2)
    if rng.random() < variety.pictures:
        changed |= {"texture": PHOTOGRAPH, "rim": float(rng.uniform(0, 0.6)) * bool(rng.random() < 0.4)}
    if changing and rng.random() < 0.5:
        changed["softness"] = float(rng.uniform(0.02, 0.2))
    return dataclasses.replace(sprite, **changed)


def _drawn_deformation(
    rng: np.random.Generator, frames: int, *, tilt: float, steepness: float, shortest: float
) -> Deformation:
    """Tilt and waves that swell, die down and travel.

    tilt: largest; steepness: largest sum of the waves' slopes; shortest: wavelength / (2 pi), in units of the frame.
    """
    time = np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)
    turn, steps = rng.uniform(0, 2 * math.pi, 2), rng.uniform(-1, 1, 2) * math.pi
    tilts = tilt * rng.random() * np.sin(turn + steps * time[:, None]) / math.sqrt(2)
    number = rng.uniform(0.5, 1.0, (_WAVES, 1)) / shortest * _directions(rng, _WAVES) * math.pi / 2
    slopes = rng.dirichlet(np.ones(_WAVES)) * steepness * rng.uniform(0.3, 1.0)
    heights = (slopes / np.linalg.norm(number, axis=1))[:, None] * _directions(rng, _WAVES)
    swell = np.sin(rng.uniform(0, 2 * math.pi, _WAVES) + rng.uniform(-1.5, 1.5, _WAVES) * math.pi * time[:, None])
    phase = rng.uniform(0, 2 * math.pi, _WAVES) + rng.uniform(-1, 1, _WAVES) * math.pi * time[:, None]
    return Deformation(tilts, swell[:, :, None] * heights, number, phase)


def _directions(rng: np.random.Generator, count: int) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi, count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _drawn_appearance(rng: np.random.Generator, frames: int) -> Appearance:
    time = (np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1))[:, None]
    exposure, tint = rng.normal(0, 0.25), rng.normal(0, 0.08, 3)
    light = np.exp((exposure + tint) * (time - rng.random()))
    shade = rng.normal(0, 0.25, 2) + rng.normal(0, 0.35, 2) * time
    shutter = float(rng.uniform(0.2, 1.0)) if rng.random() < 0.5 else 0.0
    quality = int(rng.integers(25, 85)) if rng.random() < 0.5 else None
    return Appearance(light, shade, shutter, quality)


def photographed_backgrounds(names: list[str], seeds: list[int], unit: int, variety: Variety | None) -> Tensor:
    """As `background_images`, photographs where a name says so."""
    side = image_side(unit, background=True)
    return _painted(
        names,
        seeds,
        side,
        _BACKGROUND_SHARE,
        variety,
        lambda chosen: background_images([names[index] for index in chosen], [seeds[index] for index in chosen], unit),
    )


def photographed_sprites(sprites: Sequence[Sprite], pixels: float, variety: Variety | None) -> Tensor:
    """As `sprite_images`, photographs where a texture says so."""

    def plain(chosen: list[int]) -> Tensor:
        own = [sprites[index] for index in chosen]
        return sprite_images(
            [sprite.texture for sprite in own],
            [sprite.colours for sprite in own],
            [sprite.texture_seed for sprite in own],
            pixels,
        )

    names, seeds = [sprite.texture for sprite in sprites], [sprite.texture_seed for sprite in sprites]
    return _painted(names, seeds, image_side(pixels, background=False), _SPRITE_SHARE, variety, plain)


def _painted(
    names: list[str],
    seeds: list[int],
    side: int,
    share: tuple[float, float],
    variety: Variety | None,
    plain: Callable[[list[int]], Tensor],
) -> Tensor:
    """Images [N, 3, side, side]: crops of photographs, and what `plain` gives for the others."""
    taken = [index for index, name in enumerate(names) if name == PHOTOGRAPH]
    others = [index for index, name in enumerate(names) if name != PHOTOGRAPH]
    images = torch.empty(len(names), 3, side, side)
    if others:
        images[others] = plain(others)
    if taken:
        if variety is None or variety.photographs is None:
            raise ValueError("the scene shows photographs; give the WorldConfig it was drawn for, with its variety")
        images[taken] = variety.photographs.crops([seeds[index] for index in taken], side, share)
    return images
