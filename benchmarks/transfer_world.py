"""References, prompts and measures of motion transfer on the generated world, where the true motion is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from corrdit import metrics, motion
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.integrations.embedded.world.scene import Scene, subject_words

SIZE = WorldConfig(frames=8, height=32, width=32)
FIRST_SEED = 1_000_300_000
"""Held out from training, and from the videos other choices were made on."""
TUNING_SEED = 1_000_400_000
OTHER_SCENES = 50_000
GRID = 8
LEAST = 5
REGION_STRIDE = 1000
MOVES = 2.0
"""A track counts where it moves by this many pixels in all."""


@dataclass(frozen=True)
class Case:
    """A reference with its true motion.

    video: uint8 `[T, H, W, 3]`; queries: `[P, 3]` (frame, x, y); truth: `[P, T, 2]`; visible: `[P, T]`; prompts: by
    kind.
    """

    seed: int
    video: np.ndarray
    queries: np.ndarray
    truth: np.ndarray
    visible: np.ndarray
    prompts: dict[str, str]


def motionless_prompt(scene: Scene) -> str:
    """What is seen, without a word about how it moves."""
    subjects = " and ".join(subject_words(sprite) for sprite in scene.sprites[::-1][:2])
    return f"{subjects} over {scene.background}"


def case_of(index: int, first_seed: int = FIRST_SEED) -> Case:
    """Reference number `index`: at least an eighth of its points move.

    Prompts, none of which names the motion, as in DiTFlow's evaluation: the caption of the reference, the same
    background with another subject, and another scene altogether.
    """
    seed = first_seed + index
    while True:
        (clip,) = generate([seed], SIZE)
        place = (np.arange(GRID) + 0.5) / GRID
        y, x = np.meshgrid(place * SIZE.height, place * SIZE.width, indexing="ij")
        queries = np.stack([np.zeros_like(x), x, y], axis=-1).reshape(-1, 3)
        tracks = clip.tracks(queries)
        truth, visible = np.asarray(tracks.xy).transpose(1, 0, 2), np.asarray(tracks.visible).T
        travelled = np.linalg.norm(np.diff(truth, axis=1), axis=-1).sum(1)
        chosen = (travelled > MOVES) & visible.all(1)
        if chosen.sum() >= GRID:
            break
        seed += 10 * OTHER_SCENES
    scene = clip.scene
    other = SIZE.scene(first_seed + OTHER_SCENES + index)
    prompts = {
        "caption": motionless_prompt(scene),
        "subject": f"{subject_words(other.sprites[-1])} over {scene.background}",
        "scene": motionless_prompt(other),
        "empty": "",
    }
    return Case(seed, clip.video, queries[chosen], truth[chosen], visible[chosen], prompts)


@dataclass(frozen=True)
class RegionCase:
    """A reference whose object and surroundings both move.

    mask: bool `[T, H, W]`, the object and two pixels round it; inside, outside: bool `[P]`, which of the case's points
    are the object's, and which are neither its nor near it.
    """

    case: Case
    mask: np.ndarray
    inside: np.ndarray
    outside: np.ndarray


def region_case_of(index: int, first_seed: int = FIRST_SEED) -> RegionCase:
    """Reference number `index` of those in which an object and what is round it move, `LEAST` points of each."""
    place = np.stack(np.meshgrid(np.arange(SIZE.width) + 0.5, np.arange(SIZE.height) + 0.5), axis=-1).reshape(-1, 2)
    number = index
    while True:
        case = case_of(number, first_seed)
        (clip,) = generate([case.seed], SIZE)
        layers = np.stack([clip.layers(frame, place) for frame in range(SIZE.frames)])
        own = clip.layers(0, case.queries[:, 1:])
        for layer in range(1, len(clip.scene.sprites) + 1):
            mask = (layers == layer).reshape(SIZE.frames, SIZE.height, SIZE.width)
            wide = functional.max_pool2d(torch.as_tensor(mask).float()[:, None], 5, 1, 2)[:, 0].bool().numpy()
            column, row = case.queries[:, 1:].astype(int).T
            inside, outside = own == layer, ~wide[0, row, column]
            if min(inside.sum(), outside.sum()) >= LEAST:
                return RegionCase(case, wide, inside, outside)
        number += REGION_STRIDE


def region_fidelity(region: RegionCase, video: np.ndarray) -> dict[str, float]:
    """Motion fidelity of the object's points and of those outside, each for itself."""
    case = region.case
    found = {}
    for name, chosen in {"inside": region.inside, "outside": region.outside}.items():
        tracks, wanted = (followed_patches(clip, case.queries[chosen, 1:]) for clip in (video, case.video))
        found[name] = metrics.motion_fidelity(tracks, wanted)
    return found


def followed_patches(video: np.ndarray, start: np.ndarray, *, radius: int = 3, reach: int = 5) -> np.ndarray:
    """Block matching from frame to frame: tracks `[P, T, 2]` of points `[P, 2]` of the first frame.

    The patch of (2 radius + 1)^2 pixels round a point goes to the place of the next frame, at most `reach` pixels away
    in each axis, where it differs least; of equal places the nearest.
    """
    frames, height, width, _ = video.shape
    size = 2 * radius + 1
    pixels = torch.as_tensor(video).permute(0, 3, 1, 2).float() / 255
    patches = functional.unfold(functional.pad(pixels, (radius,) * 4, mode="replicate"), size).transpose(1, 2)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([columns, rows], dim=-1).flatten(0, 1)
    now = torch.as_tensor(start).floor().long().clamp(max=torch.tensor([width - 1, height - 1]))
    rest = torch.as_tensor(start) - now
    tracks = [now + rest]
    for frame in range(frames - 1):
        wanted = patches[frame][now[:, 1] * width + now[:, 0]]
        difference = torch.cdist(wanted, patches[frame + 1])
        distance = (place[None] - now[:, None]).abs()
        difference = difference + 1e-4 * distance.sum(-1)
        best = difference.masked_fill((distance > reach).any(-1), float("inf")).argmin(1)
        now = place[best]
        tracks.append(now + rest)
    return torch.stack(tracks, dim=1).numpy()


def measures(case: Case, video: np.ndarray) -> dict[str, float]:
    """Motion fidelity and exact motion error of a generated video.

    Block matching, which knows nothing of the model, follows the same points through both videos for the fidelity; the
    errors compare the generated video's tracks with the reference's true ones.
    """
    tracks, wanted = (followed_patches(clip, case.queries[:, 1:]) for clip in (video, case.video))
    error = motion.motion_error(tracks, case.truth, visible=case.visible, still_below=0.05)
    return {
        "fidelity": metrics.motion_fidelity(tracks, wanted),
        "fidelity_released": metrics.motion_fidelity(tracks, wanted, variant="released"),
        "direction_error": error.direction,
        "speed_error": error.speed,
    }


@torch.no_grad()
def adherence(backbone: Backbone, video: np.ndarray, prompt: str, others: list[str], *, noises: int = 4) -> float:
    """Share of other prompts that explain a video worse than its own, by the model's error at fixed noise."""
    latents = backbone.encode_video(video, height=video.shape[1], width=video.shape[2])[None]
    source = torch.Generator().manual_seed(0)
    prompts = [prompt, *others]
    text = torch.cat([backbone.encoded_prompt(entry)["encoder_hidden_states"] for entry in prompts])
    error = torch.zeros(len(prompts))
    for timestep in torch.linspace(300, 800, noises).round().tolist():
        noise = torch.randn(latents.shape, generator=source)
        power = backbone.pipe.scheduler.alphas_cumprod[int(timestep)].to(latents)
        noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
        velocity = power.sqrt() * noise - (1 - power).sqrt() * latents
        batch = noisy.expand(len(prompts), *noisy.shape[1:])
        arguments = backbone.call_arguments(batch, timestep, {"encoder_hidden_states": text})
        predicted = backbone.transformer(**arguments, return_dict=False)[0]
        error += (predicted - velocity).square().mean(dim=(1, 2, 3, 4))
    return float((error[1:] > error[0]).float().mean())


def moved_frame(index: int, first_seed: int = FIRST_SEED) -> tuple[np.ndarray, np.ndarray]:
    """A clip that is one picture moved in a known direction, and the motion of a frame (dx, dy) in pixels.

    DiTFlow's appendix D. The picture is larger than the clip, so nothing has to be invented at the border.
    """
    side = 3 * SIZE.height
    (clip,) = generate([first_seed + 3 * OTHER_SCENES + index], WorldConfig(frames=1, height=side, width=side))
    rng = np.random.default_rng([first_seed, index])
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(4, 6)
    step = speed * np.array([np.cos(angle), np.sin(angle)])
    frames = []
    for frame in range(SIZE.frames):
        left, top = ((side - SIZE.height) / 2 - step * (frame - (SIZE.frames - 1) / 2)).round().astype(int)
        frames.append(clip.video[0, top : top + SIZE.height, left : left + SIZE.width])
    return np.stack(frames), step
