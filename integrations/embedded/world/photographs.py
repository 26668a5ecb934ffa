"""Photographs as surfaces of the generated world: random crops of them, in other scales and colours."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit.files import files_digest

LONGEST_SIDE = 1024
"""Pixels to which larger photographs are shrunk."""
LEAST_SIDE = 16
"""Pixels that the shorter side of a photograph must have, for crops to show anything."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Photographs:
    """The pictures of a folder, in the order of their names.

    Args:
        folder: with .jpg, .png or .webp files, as `benchmarks/photographs.py` fetches them; none of them is looked for
            in folders below.

    Attributes:
        digest: of all their bytes, in order.

    Raises:
        ValueError: no folder, one without pictures, a file that is none, or one with sides below LEAST_SIDE.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder} is no folder; give one of pictures, as benchmarks/photographs.py writes it")
        files = sorted(file for file in Path(folder).glob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ValueError(
                f"{folder} holds no pictures ({', '.join(SUFFIXES)}); give the folder that benchmarks/photographs.py "
                "wrote"
            )
        self.pictures = [_read(file) for file in files]
        self.digest = files_digest(files)[:16]

    def crops(self, seeds: Sequence[int], side: int, share: tuple[float, float]) -> Tensor:
        """Square crops in other colours, float32 [N, 3, side, side] in 0..1; each follows from its seed.

        share: least and largest side of a crop relative to the shorter side of its photograph.
        """
        return torch.stack([self._crop(np.random.default_rng([seed, 31]), side, share) for seed in seeds])

    def _crop(self, rng: np.random.Generator, side: int, share: tuple[float, float]) -> Tensor:
        picture = self.pictures[int(rng.integers(len(self.pictures)))]
        height, width = picture.shape[1:]
        size = max(8, int(min(height, width) * math.exp(rng.uniform(*np.log(share)))))
        top, left = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1))
        crop = picture[None, :, top : top + size, left : left + size].float() / 255
        crop = F.interpolate(crop, (side, side), mode="bilinear", antialias=True)[0]
        crop = crop.flip(-1) if rng.random() < 0.5 else crop
        return _recoloured(torch.rot90(crop, int(rng.integers(4)), (1, 2)), rng)


def _recoloured(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Another saturation, contrast, brightness and tint."""
    grey = image.mean(0, keepdim=True)
    image = grey + (image - grey) * rng.uniform(0.4, 1.5)
    image = (image - image.mean()) * rng.uniform(0.7, 1.3) + image.mean()
    tint = torch.from_numpy(np.exp(rng.normal(0, 0.12, 3))).float()[:, None, None]
    return (image * tint * rng.uniform(0.7, 1.3)).clamp(0.0, 1.0)


def _read(file: Path) -> Tensor:
    """uint8 [3, H, W], the longer side at most LONGEST_SIDE."""
    import imageio.v3 as imageio

    try:
        picture = torch.from_numpy(np.array(imageio.imread(file, plugin="pillow", mode="RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as a picture; repair it or take it out of the folder") from error
    scale = LONGEST_SIDE / max(picture.shape[1:])
    if min(picture.shape[1:]) * min(scale, 1) < LEAST_SIDE:
        raise ValueError(
            f"{file} is of {picture.shape[1]} x {picture.shape[2]} pixels; the shorter side of a photograph must have "
            f"at least {LEAST_SIDE}, also when the longer one is shrunk to {LONGEST_SIDE}"
        )
    if scale >= 1:
        return picture
    size = tuple(round(scale * length) for length in picture.shape[1:])
    return F.interpolate(picture[None].float(), size, mode="bilinear", antialias=True)[0].round().to(torch.uint8)
