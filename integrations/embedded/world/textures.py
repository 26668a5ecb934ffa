"""Surfaces of the generated world: fractal noise, patterns and palettes, as RGB images sampled by the renderer.

Every surface carries detail at several scales that does not repeat, so that a small piece of it says where it is: a
bare stripe or checker pattern would match itself a period away. Hue varies independently of brightness, and coarse
detail outweighs fine detail: brightness alone is one number, which many places share, and detail finer than a motion
of half a token is no longer recognised after it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND_EXTENT = 1.6
SPRITE_EXTENT = 1.15
_FIELDS = 3
_OCTAVE_FALLOFF = 0.5
_BACKGROUND_HUE, _SPRITE_HUE = 0.08, 0.09
# directions of colour that leave the brightness about as it is: red against blue, green against magenta
_WARMTH, _GREENNESS = (1.0, -0.2, -0.8), (-0.5, 1.0, -0.5)

_COLOUR_VALUES = {
    "red": (0.90, 0.12, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (1.00, 0.90, 0.10),
    "green": (0.10, 0.75, 0.20),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.95),
    "purple": (0.55, 0.15, 0.85),
    "pink": (1.00, 0.45, 0.75),
    "white": (0.97, 0.97, 0.97),
}
# dark, middle and light tone, then the stretch of the grain along x and along y
_BACKGROUND_LOOKS: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], float, float]] = {
    "grass": ((0.05, 0.20, 0.05), (0.22, 0.42, 0.14), (0.50, 0.60, 0.26), 1.0, 1.6),
    "sand": ((0.42, 0.33, 0.20), (0.66, 0.55, 0.36), (0.82, 0.74, 0.55), 1.3, 1.0),
    "water": ((0.02, 0.14, 0.28), (0.08, 0.34, 0.48), (0.45, 0.66, 0.74), 1.6, 1.0),
    "stone": ((0.16, 0.16, 0.18), (0.38, 0.38, 0.40), (0.64, 0.62, 0.60), 1.0, 1.0),
    "brick": ((0.24, 0.10, 0.08), (0.48, 0.22, 0.16), (0.66, 0.46, 0.38), 1.0, 1.0),
    "wood": ((0.20, 0.11, 0.05), (0.44, 0.28, 0.15), (0.64, 0.46, 0.28), 2.0, 1.0),
    "clouds": ((0.26, 0.38, 0.56), (0.48, 0.58, 0.72), (0.74, 0.78, 0.83), 1.3, 1.0),
}


def _octave_sizes(first: int, extent: float, pixels_per_unit: float) -> list[int]:
    """Lattice sizes, doubling until a cell is about one and a half pixels wide."""
    sizes = [first]
    while 2 * extent * pixels_per_unit / (2 * sizes[-1]) >= 1.5 and len(sizes) < 8:
        sizes.append(2 * sizes[-1])
    return sizes


def _fields(seeds: list[int], stretches: list[tuple[float, float]], sizes: list[int], texels: int) -> Tensor:
    """Independent fractal noise fields [N, 3, texels, texels] of zero mean and unit deviation.

    The lattice of each octave has its own stream, so a larger picture of the same seed only adds finer detail.
    """
    total = torch.zeros(len(seeds), _FIELDS, texels, texels)
    weights = 0.0
    for octave, size in enumerate(sizes):
        weight = _OCTAVE_FALLOFF**octave
        lattices = []
        for seed, (stretch_x, stretch_y) in zip(seeds, stretches, strict=True):
            rows, columns = max(3, round(size / stretch_y)), max(3, round(size / stretch_x))
            lattice = np.random.default_rng([seed, octave]).standard_normal((_FIELDS, rows, columns), dtype=np.float32)
            lattices.append(torch.from_numpy(lattice))
        for shape in {lattice.shape for lattice in lattices}:
            chosen = [index for index, lattice in enumerate(lattices) if lattice.shape == shape]
            stacked = torch.stack([lattices[index] for index in chosen])
            total[chosen] += weight * F.interpolate(stacked, size=(texels, texels), mode="bicubic", align_corners=False)
        weights += weight**2
    return total / math.sqrt(0.5 * weights)


def _mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    return first + (second - first) * share


def _tint(image: Tensor, fields: Tensor, strength: float) -> Tensor:
    """Vary the hue by the second and the third field, and the brightness a little by the second."""
    warmth, greenness = (torch.tensor(axis)[None, :, None, None] for axis in (_WARMTH, _GREENNESS))
    hue = warmth * fields[:, 2:3] + 0.8 * greenness * fields[:, 1:2]
    return image * (1 + 0.16 * fields[:, 1:2]) + strength * hue


def _brick_pattern(grid_x: Tensor, grid_y: Tensor) -> Tensor:
    """1 in the joints between bricks, 0 inside, rows shifted by half a brick."""
    height, width = 0.2, 0.4
    row = torch.floor(grid_y / height)
    along = grid_x / width + 0.5 * (row % 2)
    to_joint_y = (grid_y / height - row - 0.5).abs() * height
    to_joint_x = (along - torch.floor(along) - 0.5).abs() * width
    return torch.sigmoid(80 * torch.maximum(to_joint_y - height / 2 + 0.02, to_joint_x - width / 2 + 0.02))


def _surface_grid(texels: int, extent: float) -> tuple[Tensor, Tensor]:
    axis = ((torch.arange(texels) + 0.5) / texels * 2 - 1) * extent
    return axis[None, :].expand(texels, texels), axis[:, None].expand(texels, texels)


def image_side(pixels_per_unit: float, *, background: bool) -> int:
    """Texels a side of the images of backgrounds or sprites."""
    if background:
        return max(48, math.ceil(2 * BACKGROUND_EXTENT * pixels_per_unit * 1.15))
    return max(24, math.ceil(2 * SPRITE_EXTENT * pixels_per_unit * 1.3))


def background_images(names: list[str], seeds: list[int], pixels_per_unit: float) -> Tensor:
    """RGB in about 0..1, [N, 3, M, M], over the square [-1.6, 1.6] of the background's own coordinates."""
    texels = image_side(pixels_per_unit, background=True)
    looks = [_BACKGROUND_LOOKS[name] for name in names]
    sizes = _octave_sizes(12, BACKGROUND_EXTENT, pixels_per_unit)
    fields = _fields(seeds, [(look[3], look[4]) for look in looks], sizes, texels)
    dark, middle, light = (torch.tensor([look[tone] for look in looks])[:, :, None, None] for tone in range(3))
    tone = torch.sigmoid(1.7 * fields[:, 0:1])
    image = _mix(_mix(dark, middle, (2 * tone).clamp(max=1)), light, (2 * tone - 1).clamp(min=0))
    image = _tint(image, fields, _BACKGROUND_HUE)
    bricks = [index for index, name in enumerate(names) if name == "brick"]
    if bricks:
        joints = _brick_pattern(*_surface_grid(texels, BACKGROUND_EXTENT))
        image[bricks] = _mix(image[bricks], image[bricks] * 0.4 + 0.36, 0.75 * joints)
    return image.clamp(0.02, 0.95)


def _pattern(name: str, fields: Tensor) -> Tensor:
    """Share of the second colour, [N, 1, M, M], for sprites of one texture."""
    x, y = _surface_grid(fields.shape[-1], SPRITE_EXTENT)
    field = fields[:, 0:1]
    if name == "striped":
        return torch.sigmoid(5 * torch.sin(2 * math.pi * 1.35 * x + 0.5 * field))
    if name == "checkered":
        return torch.sigmoid(10 * (torch.sin(math.pi * 1.6 * x) * torch.sin(math.pi * 1.6 * y)) + 0.9 * field)
    if name == "dotted":
        wave = torch.cos(2 * math.pi * 1.2 * x) + torch.cos(2 * math.pi * 1.2 * y)
        return torch.sigmoid(5 * (wave - 0.7) + 0.9 * field)
    if name == "marbled":
        return torch.sigmoid(4 * torch.sin(2.6 * field + 2.0 * x))
    if name == "speckled":
        return torch.sigmoid(5 * (field - 0.6))
    return torch.sigmoid(6 * field)


def sprite_images(
    textures: list[str], colours: list[tuple[str, str]], seeds: list[int], pixels_per_unit: float
) -> Tensor:
    """RGB in about 0..1, [N, 3, M, M], over the square [-1.15, 1.15] of the sprite's local frame.

    pixels_per_unit: pixels of a sprite's radius, for the finest detail.
    """
    texels = image_side(pixels_per_unit, background=False)
    sizes = _octave_sizes(4, SPRITE_EXTENT, pixels_per_unit)
    fields = _fields(seeds, [(1.0, 1.0)] * len(seeds), sizes, texels)
    share = torch.empty(len(seeds), 1, texels, texels)
    for name in sorted(set(textures)):
        chosen = [index for index, texture in enumerate(textures) if texture == name]
        share[chosen] = _pattern(name, fields[chosen])
    first, second = (
        torch.tensor([_COLOUR_VALUES[pair[place]] for pair in colours])[:, :, None, None] for place in (0, 1)
    )
    image = _mix(first, 0.62 * second, share)
    return _tint(image, fields, _SPRITE_HUE).clamp(0.0, 1.0)
