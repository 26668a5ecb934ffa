"""A backbone whose queries and keys are the pixels themselves, so every answer is known, and textures that move."""

from __future__ import annotations

import numpy as np
import torch

from corrdit import TokenGrid
from corrdit.integrations.diffusers import Preset, ReadingPreset

STRIDE = 4


class PixelBackbone:
    """Tokens are 4 x 4 patches; queries and keys are their centred, normalised pixels."""

    layers = 3
    heads = 1
    token_stride = (STRIDE, STRIDE)

    def __init__(self, sharpness: float = 60.0) -> None:
        self.preset = Preset(ReadingPreset(layer=1, frames_per_chunk=5))
        self.sharpness = sharpness
        self.forwards: list[int] = []

    def fingerprint(self) -> str:
        return f"pixels {self.sharpness}"

    def timestep(self, step: int, inference_steps: int) -> float:
        return 1000.0 * -step / inference_steps

    def encode_frames(self, video: torch.Tensor, *, height: int, width: int, **resizing) -> torch.Tensor:
        if resizing:
            resized = [resizing["first"] or (height, width), (height, width)]
            pixels = video.permute(0, 3, 1, 2).float()
            for size in resized:
                pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=resizing["antialias"])
            return pixels / 255
        assert video.shape[1:3] == (height, width)
        return video.permute(0, 3, 1, 2).float() / 255

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        return latents + 0.5 * noise

    def forward(self, latents, timestep, operations):
        batched = latents if latents.ndim == 5 else latents[None]
        batch, frames, _, height, width = batched.shape
        self.forwards.append(frames)
        patches = torch.nn.functional.unfold(batched.flatten(0, 1), STRIDE, stride=STRIDE).transpose(1, 2)
        patches = torch.nn.functional.normalize(patches - patches.mean(-1, keepdim=True), dim=-1)
        tokens = patches.unflatten(0, (batch, frames)).flatten(1, 2)[:, None]
        tokens = tokens * (self.sharpness * patches.shape[-1] ** 0.5) ** 0.5
        grid = TokenGrid(frames, height // STRIDE, width // STRIDE)
        return {layer: operation(tokens, tokens, grid, None) for layer, operation in operations.items()}


def moving_texture(frames: int, step: tuple[int, int], size: tuple[int, int] = (64, 96), seed: int = 0) -> np.ndarray:
    """uint8 `[T, H, W, 3]`: noise that moves by `step` (dx, dy) pixels a frame."""
    rng = np.random.default_rng(seed)
    reach = frames * max(abs(step[0]), abs(step[1])) + 8
    texture = rng.integers(0, 256, (size[0] + 2 * reach, size[1] + 2 * reach, 3), dtype=np.uint8)
    return np.stack([
        texture[reach - t * step[1] :, reach - t * step[0] :][: size[0], : size[1]] for t in range(frames)
    ])  # fmt: skip


def shifting_texture(frames: int, step: float, size: tuple[int, int] = (64, 96), seed: int = 0) -> np.ndarray:
    """uint8 `[T, H, W, 3]`: smooth noise that moves to the right by `step` pixels a frame, whole or not."""
    generator = torch.Generator().manual_seed(seed)
    wide = (size[0], size[1] + 64)
    octaves = [
        torch.nn.functional.interpolate(
            torch.randn(1, 3, wide[0] // scale, wide[1] // scale, generator=generator), wide, mode="bicubic"
        )
        for scale in (10, 5)
    ]
    smooth = 0.5 + 0.12 * (octaves[0] + octaves[1])
    column = torch.arange(size[1]) + 48.0
    pictures = []
    for t in range(frames):
        place = column - step * t
        low, share = place.floor().long(), place - place.floor()
        pictures.append(smooth[0, :, :, low] * (1 - share) + smooth[0, :, :, low + 1] * share)
    video = torch.stack(pictures).permute(0, 2, 3, 1).clamp(0, 1)
    return (255 * video).round().to(torch.uint8).numpy()
