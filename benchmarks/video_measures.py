"""Measures of a generated video that need no reference and no learned model: consistency, motion, contrast, sharpness.

Videos are float `[B, T, 3, H, W]` in 0..1; every measure is `[B]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK, STRIDE, RADIUS = 8, 4, 6
PATCH = 7
RETURN_PIXELS = 1.5
STILLNESS_BONUS = 1e-6
"""Added to a block's squared difference for each squared pixel of displacement: flat blocks count as standing still."""


def measures(videos: torch.Tensor) -> dict[str, torch.Tensor]:
    """All measures by name.

    - residual: what is left of 8 x 8 blocks after the best displacement (up to 6 pixels) to the next frame, root mean
      square, relative to the contrast. Lower is more consistent.
    - survival: share of 7 x 7 patches of the first frame that can be followed to the last, frame by frame, where
      following back has to return within 1.5 pixels each time.
    - drift: root mean square change of those patches along their paths since the first frame, relative to contrast.
    - motion: mean displacement of blocks, pixels a frame (dynamic degree).
    - contrast: standard deviation of the pixels of a frame.
    - sharpness: root mean square of the Laplacian relative to the contrast.
    """
    contrast = videos.std(dim=(-1, -2, -3)).square().mean(dim=1).sqrt()
    left, displacement = block_matches(videos)
    survival, change = followed_patches(videos)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    edges = F.conv2d(videos.flatten(0, 2)[:, None], kernel).unflatten(0, videos.shape[:3])
    return {
        "residual": left / contrast,
        "survival": survival,
        "drift": change / contrast,
        "motion": displacement,
        "contrast": contrast,
        "sharpness": edges.square().mean(dim=(1, 2, 3, 4, 5)).sqrt() / contrast,
    }


def block_matches(videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(root mean square left after the best displacement, mean length of the displacement in pixels)."""
    before, after = videos[:, :-1].flatten(0, 1), videos[:, 1:].flatten(0, 1)
    inside = torch.ones_like(after[:, :1])
    padded, padded_inside = F.pad(after, (RADIUS,) * 4), F.pad(inside, (RADIUS,) * 4)
    height, width = videos.shape[-2:]
    best = torch.full_like(_blocks(inside), torch.inf)
    chosen, length = best.clone(), torch.zeros_like(best)
    for dy in range(-RADIUS, RADIUS + 1):
        for dx in range(-RADIUS, RADIUS + 1):
            rows, columns = slice(RADIUS + dy, RADIUS + dy + height), slice(RADIUS + dx, RADIUS + dx + width)
            difference = _blocks((before - padded[..., rows, columns]).square().mean(dim=1, keepdim=True))
            outside = _blocks(padded_inside[..., rows, columns]) < 1
            cost = (difference + STILLNESS_BONUS * (dx * dx + dy * dy)).masked_fill(outside, torch.inf)
            better = cost < best
            best = torch.where(better, cost, best)
            chosen = torch.where(better, difference, chosen)
            length = torch.where(better, torch.full_like(length, (dx * dx + dy * dy) ** 0.5), length)
    shape = (videos.shape[0], -1)
    return chosen.reshape(shape).mean(dim=1).sqrt(), length.reshape(shape).mean(dim=1)


def followed_patches(videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of patches followed to the last frame, root mean square change along the paths)."""
    batch, frames, _, height, width = videos.shape
    ys, xs = (torch.arange(PATCH // 2, size - PATCH // 2, STRIDE) for size in (height, width))
    start = torch.cartesian_prod(ys, xs)[None].expand(batch, -1, -1)
    here, alive = start, torch.ones(start.shape[:2], dtype=torch.bool)
    first, changes = _patches(videos[:, 0], start), []
    for frame in range(frames - 1):
        there = _best_place(videos[:, frame], videos[:, frame + 1], here)
        back = _best_place(videos[:, frame + 1], videos[:, frame], there)
        alive &= (back - here).float().norm(dim=-1) <= RETURN_PIXELS
        here = there
        changes.append((_patches(videos[:, frame + 1], here) - first).square().mean(dim=(1, 2)))
    return alive.float().mean(dim=1), torch.stack(changes).mean(dim=0).sqrt()


def _blocks(images: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(images, BLOCK, STRIDE)


def _patches(images: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Patches `[B, P, 3 * PATCH * PATCH]` round centres `[B, P, (y, x)]`, borders repeated."""
    margin = PATCH // 2
    unfolded = F.unfold(F.pad(images, (margin,) * 4, mode="replicate"), PATCH)
    index = centres[..., 0] * images.shape[-1] + centres[..., 1]
    return unfolded.gather(2, index[:, None].expand(-1, unfolded.shape[1], -1)).transpose(1, 2)


def _best_place(source: torch.Tensor, target: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Where in `target` the patches round `centres` of `source` look most alike, `[B, P, (y, x)]`."""
    height, width = source.shape[-2:]
    steps = torch.arange(-RADIUS, RADIUS + 1)
    offsets = torch.cartesian_prod(steps, steps)
    offsets = offsets[offsets.square().sum(dim=1).argsort(stable=True)]
    candidates = centres[:, :, None] + offsets
    limits = torch.tensor([height - 1, width - 1])
    candidates = candidates.clamp(min=0).minimum(limits)
    found = _patches(target, candidates.flatten(1, 2)).unflatten(1, candidates.shape[1:3])
    cost = (found - _patches(source, centres)[:, :, None]).square().mean(dim=-1)
    best = (cost + STILLNESS_BONUS * (candidates - centres[:, :, None]).square().sum(dim=-1)).argmin(dim=-1)
    return candidates.gather(2, best[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
