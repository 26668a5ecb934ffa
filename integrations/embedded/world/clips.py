"""The generated video world: videos from seeds with exact point correspondence.

A video shows a textured background under a moving camera and one to five textured sprites with their own motion that
occlude each other and leave the frame; light may change, and there may be blur and noise. Since every surface moves
by a known similarity transform, the place and the visibility of any of its points in any frame are exact. With a
`Variety` surfaces are photographs, tilt and bend too, by maps whose inverse is as exact.

Pixel coordinates: the origin is the frame's top left corner and the centre of the first pixel is (0.5, 0.5).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from corrdit.arguments import whole_number
from corrdit.data.tapvid import TapVidVideo
from corrdit.integrations.embedded.world.deformations import Deformations
from corrdit.integrations.embedded.world.development import develop, exposures
from corrdit.integrations.embedded.world.scene import (
    MOST_SPRITES,
    SPRITE_TEXTURES,
    Camera,
    Scene,
    Sprite,
    check_sprites,
    describe,
    draw_scene,
)
from corrdit.integrations.embedded.world.shapes import SHAPES, signed_distance
from corrdit.integrations.embedded.world.textures import BACKGROUND_EXTENT, SPRITE_EXTENT
from corrdit.integrations.embedded.world.variety import (
    Variety,
    photographed_backgrounds,
    photographed_sprites,
    varied,
)

_RIM = 0.13
_CANDIDATES = 16


@dataclass(frozen=True)
class WorldConfig:
    """Size and content of the videos: frames, height and width in pixels (at least 8), least and most number of
    sprites (1 to 5), and what they show beyond the plain world (None: nothing). Raises ValueError for others."""

    frames: int = 8
    height: int = 32
    width: int = 32
    sprites: tuple[int, int] = (1, MOST_SPRITES)
    variety: Variety | None = None

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 8), ("width", 8)):
            object.__setattr__(self, name, whole_number(f"{name} of a generated video", getattr(self, name), least))
        object.__setattr__(self, "sprites", check_sprites(self.sprites))
        if not isinstance(self.variety, Variety | None):
            raise ValueError(f"variety must be a Variety or None, got {self.variety!r}")

    @property
    def unit(self) -> int:
        """Pixels in one unit of length, the shorter side."""
        return min(self.height, self.width)

    def scene(self, seed: int) -> Scene:
        """The scene of a seed in this aspect ratio and number of frames."""
        scene = draw_scene(seed, self.frames, self.width / self.height, self.sprites)
        return scene if self.variety is None else varied(scene, self.variety)


@dataclass(frozen=True)
class Truth:
    """Exact tracks: xy float32 [T, P, 2] in pixels, visible bool [T, P]; positions of hidden points are exact too."""

    xy: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class Flow:
    """Exact forward flow: displacement float32 [T-1, H, W, 2] in pixels, of every pixel centre from a frame to the
    next; visible bool [T-1, H, W], whether the pixel's point is seen in the next frame."""

    displacement: np.ndarray
    visible: np.ndarray


def _rotation(angle: Tensor) -> Tensor:
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)


def _stacked(items: Sequence[Scene | Camera | Sprite], name: str) -> Tensor:
    """A value of each item over time, float64 [N, T, ...]."""
    return torch.from_numpy(np.stack([getattr(item, name) for item in items]))


def _sampled(images: Tensor, places: Tensor, padding_mode: str) -> Tensor:
    """Colours [N, T, 3, H, W] of images [N, 3, M, M] at places [N, T, H, W, 2], whose edges are -1 and 1."""
    colours = F.grid_sample(images, places.flatten(1, 2), "bilinear", padding_mode, align_corners=False)
    return colours.unflatten(2, places.shape[1:3]).transpose(1, 2)


def _paint_background(scenes: Sequence[Scene], config: WorldConfig, grid: Tensor) -> Tensor:
    """[B, T, 3, H, W]"""
    names, seeds = [scene.background for scene in scenes], [scene.background_seed for scene in scenes]
    images = photographed_backgrounds(names, seeds, config.unit, config.variety)
    cameras = [scene.camera for scene in scenes]
    center, angle, zoom = (_stacked(cameras, name).float() for name in ("center", "angle", "zoom"))
    matrix = _rotation(angle) * zoom[..., None, None]
    places = torch.einsum("btij,hwj->bthwi", matrix, grid) + center[:, :, None, None]
    places, _ = Deformations([camera.deformation for camera in cameras], torch.float32).to_surface(places)
    return _sampled(images, places / BACKGROUND_EXTENT, "reflection").contiguous()


def _sprite_poses(sprites: Sequence[Sprite], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse rotation [N, T, 2, 2], centre [N, T, 2] and radius [N, T]."""
    angle, center, radius = (_stacked(sprites, name).to(dtype) for name in ("angle", "center", "radius"))
    return _rotation(-angle), center, radius


def _paint_sprites(sprites: Sequence[Sprite], config: WorldConfig, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Colour [N, T, 3, H, W] and coverage [N, T, 1, H, W] of every sprite by itself, with a dark rim inside its
    outline."""
    images = photographed_sprites(sprites, 0.25 * config.unit, config.variety)
    inverse, center, radius = _sprite_poses(sprites, torch.float32)
    offset = grid - center[:, :, None, None]
    local = torch.einsum("ntij,nthwj->nthwi", inverse, offset) / radius[:, :, None, None, None]
    local, front = Deformations([sprite.deformation for sprite in sprites], torch.float32).to_surface(local)
    distance = signed_distance(local, [sprite.shape for sprite in sprites])
    pixels = (radius * config.unit)[:, :, None, None]
    softness, darkness = (
        torch.tensor([getattr(sprite, name) for sprite in sprites]).reshape(-1, 1, 1, 1) for name in ("softness", "rim")
    )
    # Half of the pixel is covered on the outline itself, however soft it is.
    coverage = (0.5 - distance * pixels / (softness * pixels).clamp(min=1)).clamp(0, 1)
    if front is not None:
        coverage = coverage * front
    rim = ((distance + _RIM) * pixels + 0.5).clamp(0, 1)
    colour = _sampled(images, local / SPRITE_EXTENT, "border")
    return colour * (1 - (darkness * rim)[:, :, None]), coverage[:, :, None]


def render(scenes: Sequence[Scene], config: WorldConfig) -> Tensor:
    """Paint scenes drawn for `config`: float32 [B, T, 3, H, W] in 0..1. Raises ValueError for scenes of another length
    or aspect ratio, and for none."""
    if not scenes:
        raise ValueError("no scenes were given; give at least one")
    for scene in scenes:
        if scene.frames != config.frames or not math.isclose(scene.aspect, config.width / config.height):
            raise ValueError(
                f"the scene of seed {scene.seed} was drawn for {scene.frames} frames of aspect {scene.aspect:.4g}, not "
                f"for {config}; draw it with config.scene(seed)"
            )
    video = _paint(scenes, config)
    blurred = [index for index, scene in enumerate(scenes) if scene.appearance and scene.appearance.shutter]
    if blurred:
        moments = [_paint(moment, config) for moment in exposures([scenes[index] for index in blurred])]
        video[blurred] = torch.stack(moments).mean(0)
    return develop(video, scenes, config.unit)


def _paint(scenes: Sequence[Scene], config: WorldConfig) -> Tensor:
    """Surfaces in their places, float32 [B, T, 3, H, W]."""
    rows = (torch.arange(config.height) + 0.5 - config.height / 2) / config.unit
    columns = (torch.arange(config.width) + 0.5 - config.width / 2) / config.unit
    # Pixel centres in units, [H, W, 2].
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    video = _paint_background(scenes, config, grid)
    owners = [index for index, scene in enumerate(scenes) for _ in scene.sprites]
    ranks = [rank for scene in scenes for rank in range(len(scene.sprites))]
    colour, coverage = _paint_sprites([sprite for scene in scenes for sprite in scene.sprites], config, grid)
    for rank in range(max(ranks) + 1):
        chosen = [index for index, value in enumerate(ranks) if value == rank]
        below = [owners[index] for index in chosen]
        video[below] += (colour[chosen] - video[below]) * coverage[chosen]
    return video


class Clip:
    """One generated video with its exact truth.

    video: uint8 [T, H, W, 3]; prompt: its caption; scene: what it shows.
    """

    def __init__(self, scene: Scene, config: WorldConfig, video: np.ndarray) -> None:
        self.scene = scene
        self.config = config
        self.video = video
        self.prompt = describe(scene)
        self._middle = torch.tensor([config.width, config.height]) / 2

    def layers(self, frame: int, xy: np.ndarray) -> np.ndarray:
        """Which surface is seen at points xy [P, 2] (pixels) of a frame: int64 [P], 0 the background, k the k-th sprite
        from the back. Raises ValueError for a frame that the clip has not, and for points that are not such."""
        places = np.asarray(xy, dtype=np.float64)
        if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
            raise ValueError(f"xy must be finite and of shape [P, 2], got shape {places.shape}")
        if whole_number("frame", frame, 0) >= self.config.frames:
            raise ValueError(f"frame must be 0 to {self.config.frames - 1}, got {frame}")
        seen = self._sprite_cover(torch.from_numpy(places)[None], [frame])[:, 0]
        order = torch.arange(1, len(seen) + 1)[:, None]
        return (seen * order).amax(dim=0).numpy()

    def tracks(self, queries: np.ndarray) -> Truth:
        """Exact tracks of the surface points seen at the queries.

        queries: [P, 3] (frame, x, y), whole frame numbers and pixels inside of the frame, its border included. A point
        is visible in its query's frame. Raises ValueError otherwise.
        """
        queries = np.asarray(queries, dtype=np.float64)
        config = self.config
        if queries.ndim != 2 or queries.shape[1] != 3 or not np.isfinite(queries).all():
            raise ValueError(f"queries must be finite and of shape [P, 3] (frame, x, y), got shape {queries.shape}")
        highest = np.array([config.frames - 1, config.width, config.height])
        if (queries < 0).any() or (queries > highest).any() or (queries[:, 0] != np.floor(queries[:, 0])).any():
            raise ValueError(
                f"queries must lie on frames 0..{config.frames - 1} and inside of {config.width}x{config.height} pixels"
            )
        truth = self._follow(queries, list(range(config.frames)))
        # A query on the frame's border may leave it by rounding, and those on the right and the lower one are outside.
        truth.visible[queries[:, 0].astype(np.int64), np.arange(len(queries))] = True
        return truth

    def flow(self) -> Flow:
        """Exact forward flow of every pixel centre."""
        config = self.config
        columns, rows = np.meshgrid(np.arange(config.width) + 0.5, np.arange(config.height) + 0.5)
        xy = np.stack([columns, rows], axis=-1).reshape(-1, 2)
        displacement, visible = [], []
        for frame in range(config.frames - 1):
            queries = np.concatenate([np.full((len(xy), 1), float(frame)), xy], axis=1)
            truth = self._follow(queries, [frame + 1])
            displacement.append((truth.xy[0] - xy).reshape(config.height, config.width, 2))
            visible.append(truth.visible[0].reshape(config.height, config.width))
        if not displacement:
            raise ValueError("flow needs at least two frames, the clip has one")
        return Flow(np.stack(displacement).astype(np.float32), np.stack(visible))

    def _follow(self, queries: np.ndarray, targets: list[int]) -> Truth:
        """Places and visibility in the target frames only, [targets, P]."""
        frames, xy = queries[:, 0].astype(np.int64), queries[:, 1:]
        layer = np.zeros(len(queries), dtype=np.int64)
        for frame in np.unique(frames):
            chosen = frames == frame
            layer[chosen] = self.layers(int(frame), xy[chosen])
        moved = self._move(torch.from_numpy(frames), torch.from_numpy(xy), torch.from_numpy(layer), targets)
        cover = self._sprite_cover(moved, targets)
        order = torch.arange(1, len(cover) + 1)[:, None, None]
        hidden = (cover & (order > torch.from_numpy(layer))).any(dim=0)
        size = torch.tensor([self.config.width, self.config.height])
        inside = ((moved >= 0) & (moved < size)).all(dim=-1)
        return Truth(moved.float().numpy(), (inside & ~hidden).numpy())

    def _sprite_cover(self, xy: Tensor, frames: list[int]) -> Tensor:
        """Whether each sprite covers points xy [T', P, 2] of the given T' frames: bool [sprites, T', P]."""
        inverse, center, radius = _sprite_poses(self.scene.sprites, torch.float64)
        offset = (xy - self._middle) / self.config.unit - center[:, frames, None]
        local = torch.einsum("ntij,ntpj->ntpi", inverse[:, frames], offset) / radius[:, frames, None, None]
        rows = torch.arange(len(local))
        deformations = Deformations([sprite.deformation for sprite in self.scene.sprites], torch.float64)
        local, front = deformations.chosen(rows, torch.tensor(frames).expand(len(rows), -1)).to_surface(local)
        covered = signed_distance(local, [sprite.shape for sprite in self.scene.sprites]) <= 0
        return covered if front is None else covered & front

    def _move(self, frames: Tensor, xy: Tensor, layer: Tensor, targets: list[int]) -> Tensor:
        """Carry points [P, 2] seen on a layer of their frames to the target frames: [targets, P, 2]."""
        camera, sprites = self.scene.camera, self.scene.sprites
        surfaces = Deformations([camera.deformation, *(sprite.deformation for sprite in sprites)], torch.float64)
        # As a screen-from-surface similarity the background has the inverse of the camera's zoom and angle.
        angle = torch.from_numpy(np.stack([-camera.angle, *(sprite.angle for sprite in sprites)]))
        scale = torch.from_numpy(np.stack([1 / camera.zoom, *(sprite.radius for sprite in sprites)]))
        matrix = _rotation(angle) * scale[..., None, None]
        background_shift = -torch.einsum("tij,tj->ti", matrix[0], torch.from_numpy(camera.center))
        shift = torch.stack([background_shift, *(torch.from_numpy(sprite.center) for sprite in sprites)])
        start = (xy - self._middle) / self.config.unit - shift[layer, frames]
        seen = torch.linalg.solve(matrix[layer, frames], start)[:, None]
        surface, _ = surfaces.chosen(layer, frames[:, None]).to_surface(seen)
        surface = surface.expand(-1, len(targets), -1)
        local = surfaces.chosen(layer, torch.tensor(targets).expand(len(layer), -1)).to_local(surface)
        matrix, shift = matrix[:, targets], shift[:, targets]
        places = torch.einsum("ptij,ptj->tpi", matrix[layer], local) + shift[layer].transpose(0, 1)
        return places * self.config.unit + self._middle


def generate(seeds: Iterable[int], config: WorldConfig | None = None) -> list[Clip]:
    """Generated clips of one size, one for each seed; a seed gives the same clip in any batch. Raises ValueError for
    seeds that are not whole numbers of at least 0."""
    config = config or WorldConfig()
    if not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be a list of whole numbers, got {seeds!r}; give [{seeds!r}] for one clip")
    scenes = [config.scene(seed) for seed in seeds]
    frames = (render(scenes, config) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    return [Clip(scene, config, video.contiguous().numpy()) for scene, video in zip(scenes, frames, strict=True)]


def demo_clip(seed: int = 22) -> tuple[np.ndarray, Clip]:
    """A clip for demonstrations: video uint8 [20, 160, 240, 3] and the clip whose `tracks` gives its exact truth."""
    clip = generate([seed], WorldConfig(frames=20, height=160, width=240, sprites=(2, 4)))[0]
    return clip.video, clip


def sample_queries(clip: Clip, count: int, seed: int = 0) -> np.ndarray:
    """Random points of a clip, about half of them on its sprites as far as these are in view.

    count: at least 1. Returns float64 [count, 3] (frame, x, y) in pixels, at random frames. Raises ValueError for a
    count below 1 and a negative seed.
    """
    count, seed = whole_number("count", count, 1), whole_number("seed", seed, 0)
    rng = np.random.default_rng([seed, clip.scene.seed])
    config = clip.config
    candidates = rng.random((_CANDIDATES * count, 3)) * [config.frames, config.width, config.height]
    candidates[:, 0] = np.floor(candidates[:, 0])
    on_sprite = np.zeros(len(candidates), dtype=bool)
    for frame in range(config.frames):
        chosen = candidates[:, 0] == frame
        on_sprite[chosen] = clip.layers(frame, candidates[chosen, 1:]) > 0
    moving, ground = candidates[on_sprite], candidates[~on_sprite]
    from_sprites = min(len(moving), max(count // 2, count - len(ground)))
    return np.concatenate([moving[:from_sprites], ground[: count - from_sprites]])


def as_tapvid(clip: Clip, queries: np.ndarray, name: str) -> TapVidVideo:
    """The clip with the exact tracks of queries [P, 3] in the layout of TAP-Vid."""
    truth = clip.tracks(queries)
    shares = truth.xy.transpose(1, 0, 2) / np.array([clip.config.width, clip.config.height])
    return TapVidVideo(name=name, video=clip.video, points=shares, occluded=~truth.visible.T)


__all__ = ["SHAPES", "SPRITE_TEXTURES", "Clip", "Flow", "Truth", "WorldConfig", "demo_clip", "generate", "render"]
