"""What happens in a generated video: camera, sprites and light, drawn from a seed; and the same in words.

A scene is free of pixels. Lengths are in units of the frame's shorter side, the origin is the centre of the frame, x
points right and y down; time runs over the clip. The same seed gives the same scene at every size; another aspect
ratio or another number of frames shows the same objects on paths of the same kind.

The words are what the text encoder of the embedded model is trained on. Three kinds, as in DiTFlow's evaluation: the
caption (everything), the subject alone and the scene alone.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from corrdit.arguments import choice, whole_number
from corrdit.integrations.embedded.world.deformations import Deformation
from corrdit.integrations.embedded.world.shapes import SHAPES

SPRITE_TEXTURES = ("striped", "dotted", "checkered", "marbled", "speckled", "patched")
BACKGROUNDS = ("grass", "sand", "water", "stone", "brick", "wood", "clouds")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white")
PATHS = ("linear", "accelerated", "circular", "bouncing", "still")
DIRECTIONS = {
    "right": (1.0, 0.0),
    "down right": (math.sqrt(0.5), math.sqrt(0.5)),
    "down": (0.0, 1.0),
    "down left": (-math.sqrt(0.5), math.sqrt(0.5)),
    "left": (-1.0, 0.0),
    "up left": (-math.sqrt(0.5), -math.sqrt(0.5)),
    "up": (0.0, -1.0),
    "up right": (math.sqrt(0.5), -math.sqrt(0.5)),
}
MOST_SPRITES = 5
HELD_OUT_SEEDS = 1_000_000_000
"""First seed of the videos that no training sees."""
PROMPT_KINDS = ("caption", "subject", "scene")
_DESCRIBED_SPRITES = 2
_SPRITE_COUNT_ODDS = (0.40, 0.27, 0.16, 0.10, 0.07)
_PATH_ODDS = (0.48, 0.14, 0.13, 0.13, 0.12)


@dataclass(frozen=True)
class Sprite:
    """One moving object. center [T, 2], angle [T] (radians, clockwise on the screen) and radius [T] are on the
    screen; deformation is within its radius. rim is how dark the inside of its outline is, softness the width of the
    outline's blur in radii."""

    shape: str
    texture: str
    colours: tuple[str, str]
    path: str
    direction: str
    center: np.ndarray
    angle: np.ndarray
    radius: np.ndarray
    texture_seed: int
    deformation: Deformation | None = None
    rim: float = 0.7
    softness: float = 0.0

    @property
    def turns(self) -> bool:
        """Whether it turns by more than 35 degrees over the clip."""
        return abs(float(self.angle[-1] - self.angle[0])) > math.radians(35)

    @property
    def growth(self) -> float:
        """Ratio of its last to its first radius."""
        return float(self.radius[-1] / self.radius[0])


@dataclass(frozen=True)
class Camera:
    """Maps a screen point u of frame t to the background: zoom[t] * R(angle[t]) @ u + center[t], then deformed."""

    move: str
    center: np.ndarray
    angle: np.ndarray
    zoom: np.ndarray
    deformation: Deformation | None = None


@dataclass(frozen=True)
class Appearance:
    """How the picture of a surface changes on the way to the video.

    light: [T, 3], gain of red, green and blue. shade: [T, 2], slope of the gain over the frame, per unit of length.
    shutter: how much of the time between two frames each is exposed for. quality: of JPEG's compression, None for none.
    """

    light: np.ndarray
    shade: np.ndarray
    shutter: float
    quality: int | None


@dataclass(frozen=True)
class Scene:
    """Everything that is seen in one generated video; sprites are listed from back to front."""

    seed: int
    frames: int
    aspect: float
    background: str
    background_seed: int
    camera: Camera
    sprites: tuple[Sprite, ...]
    gain: np.ndarray = field(repr=False)
    offset: np.ndarray = field(repr=False)
    blur: float
    noise: float
    noise_seed: int
    appearance: Appearance | None = None


def _phase(frames: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, frames) if frames > 1 else np.zeros(1)


def _stretch(frames: int) -> float:
    """Longer clips show longer paths, though slower ones: travel grows as the root of the number of steps."""
    return math.sqrt(max(frames - 1, 1) / 7)


def _reflect(values: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Fold a straight path [T, 2] back into [-limit, limit] of each axis."""
    period = 4 * limit
    folded = np.mod(values + limit, period)
    return np.where(folded > 2 * limit, period - folded, folded) - limit


def _draw_camera(rng: np.random.Generator, frames: int) -> Camera:
    phase, stretch = _phase(frames), _stretch(frames)
    kind = rng.choice(["still", "pan", "zoom", "rotate"], p=[0.12, 0.58, 0.15, 0.15])
    name = str(rng.choice(list(DIRECTIONS)))
    travel = rng.uniform(0.3, 0.9) * stretch
    turn = math.radians(rng.uniform(20, 55)) * rng.choice([-1.0, 1.0]) * stretch
    enlarge = math.log(rng.uniform(1.3, 1.8)) * rng.choice([-1.0, 1.0])
    drift = rng.normal(0.0, 0.04, 2) * stretch
    start = rng.uniform(-0.3, 0.3, 2)
    center = start + np.zeros((frames, 2))
    angle, zoom = np.full(frames, rng.uniform(-math.pi, math.pi) * 0.08), np.full(frames, rng.uniform(0.85, 1.15))
    move = "is still"
    if kind != "still":
        center = center + (phase[:, None] - 0.5) * drift
    if kind == "pan":
        center = center + (phase[:, None] - 0.5) * travel * np.array(DIRECTIONS[name])
        move = f"pans {name}"
    elif kind == "zoom":
        zoom = zoom * np.exp(enlarge * (phase - 0.5))
        move = "zooms out" if enlarge > 0 else "zooms in"
    elif kind == "rotate":
        angle = angle + turn * (phase - 0.5)
        move = "turns right" if turn > 0 else "turns left"
    return Camera(move, center, angle, zoom)


def _draw_path(rng: np.random.Generator, path: str, frames: int, half: np.ndarray) -> tuple[str, np.ndarray]:
    phase, stretch = _phase(frames), _stretch(frames)
    name = str(rng.choice(list(DIRECTIONS)))
    way = np.array(DIRECTIONS[name])
    middle = rng.uniform(-0.45, 0.45, 2) * half * 2 * 0.8
    travel = rng.uniform(0.45, 1.05) * stretch
    orbit, start_angle = rng.uniform(0.16, 0.34), rng.uniform(0, 2 * math.pi)
    sweep = math.radians(rng.uniform(150, 330)) * rng.choice([-1.0, 1.0]) * stretch
    if path == "linear":
        return name, middle + (phase[:, None] - 0.5) * travel * way
    if path == "accelerated":
        return name, middle + (phase[:, None] ** 2 - 0.4) * 1.1 * travel * way
    if path == "circular":
        angle = start_angle + sweep * phase
        around = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return "clockwise" if sweep > 0 else "anticlockwise", 0.5 * middle + orbit * around
    if path == "bouncing":
        return name, _reflect(middle + phase[:, None] * 1.6 * travel * way, half - 0.1)
    return "", middle + np.zeros((frames, 2))


def _draw_sprite(rng: np.random.Generator, frames: int, half: np.ndarray, size: float) -> Sprite:
    phase, stretch = _phase(frames), _stretch(frames)
    path = str(rng.choice(PATHS, p=_PATH_ODDS))
    direction, center = _draw_path(rng, path, frames, half)
    first, second = rng.choice(len(COLOURS), 2, replace=False)
    turn = math.radians(rng.uniform(45, 150)) * rng.choice([-1.0, 1.0]) * stretch
    grow = math.log(rng.uniform(1.35, 1.9)) * rng.choice([-1.0, 1.0])
    turns, grows = rng.random() < 0.25, rng.random() < 0.2
    if path == "still":
        turns, grows = (True, grows) if rng.random() < 0.5 else (turns, True)
    angle = rng.uniform(-0.35, 0.35) + (turn * phase if turns else np.zeros(frames))
    radius = size * np.exp(grow * (phase - 0.5) if grows else np.zeros(frames))
    return Sprite(
        shape=str(rng.choice(SHAPES)),
        texture=str(rng.choice(SPRITE_TEXTURES)),
        colours=(COLOURS[first], COLOURS[second]),
        path=path,
        direction=direction,
        center=center,
        angle=angle,
        radius=radius,
        texture_seed=int(rng.integers(2**31)),
    )


def check_sprites(sprites: tuple[int, int]) -> tuple[int, int]:
    """Least and most number of sprites as whole numbers; a ValueError where there can be none such."""
    try:
        least, most = (whole_number("a number of sprites", count, 1) for count in sprites)
    except (TypeError, ValueError):
        least, most = 0, 0
    if not 1 <= least <= most <= MOST_SPRITES:
        raise ValueError(f"sprites must be (least, most) with 1 <= least <= most <= {MOST_SPRITES}, got {sprites}")
    return least, most


def draw_scene(seed: int, frames: int, aspect: float, sprites: tuple[int, int] = (1, MOST_SPRITES)) -> Scene:
    """The scene of a seed.

    seed: non-negative; frames: at least 1; aspect: width over height; sprites: least and most number of sprites, 1
    to 5. Raises ValueError for values outside of these.
    """
    least, most = check_sprites(sprites)
    seed, frames = whole_number("seed", seed, 0), whole_number("frames", frames, 1)
    if not 0 < aspect < math.inf:
        raise ValueError(f"aspect must be a positive number, width over height, got {aspect!r}")
    rng = np.random.default_rng([seed, 20_231])
    half = np.array([max(aspect, 1.0), max(1 / aspect, 1.0)]) / 2
    camera = _draw_camera(rng, frames)
    background = str(rng.choice(BACKGROUNDS))
    background_seed, noise_seed = (int(value) for value in rng.integers(2**31, size=2))
    odds = np.array(_SPRITE_COUNT_ODDS[least - 1 : most])
    count = least + int(rng.choice(len(odds), p=odds / odds.sum()))
    largest = {1: 0.34, 2: 0.29}.get(count, 0.25)
    phase = _phase(frames)
    gain = 1 + (rng.uniform(-0.25, 0.25) * (phase - 0.5) if rng.random() < 0.35 else np.zeros(frames))
    offset = rng.uniform(-0.08, 0.08) * (phase - 0.5) if rng.random() < 0.2 else np.zeros(frames)
    blur = float(rng.uniform(0.0, 0.016)) if rng.random() < 0.25 else 0.0
    noise = float(rng.uniform(0.0, 0.025)) if rng.random() < 0.4 else 0.0
    drawn = tuple(
        _draw_sprite(rng, frames, half, float(rng.uniform(0.15, largest) if count > 1 else rng.uniform(0.19, largest)))
        for _ in range(count)
    )
    return Scene(
        seed=seed,
        frames=frames,
        aspect=aspect,
        background=background,
        background_seed=background_seed,
        camera=camera,
        sprites=drawn,
        gain=np.asarray(gain, dtype=np.float64),
        offset=np.asarray(offset, dtype=np.float64),
        blur=blur,
        noise=noise,
        noise_seed=noise_seed,
    )


def subject_words(sprite: Sprite) -> str:
    """For instance "a red striped disc"."""
    article = "an" if sprite.colours[0][0] in "aeiou" else "a"
    return f"{article} {sprite.colours[0]} {sprite.texture} {sprite.shape}"


def motion_words(sprite: Sprite) -> str:
    """For instance "moves left", "circles clockwise", "bounces up and grows"."""
    verbs = {"linear": "moves", "accelerated": "accelerates", "circular": "circles", "bouncing": "bounces"}
    extra = []
    if sprite.turns:
        extra.append("turns")
    if abs(sprite.growth - 1) > 0.2:
        extra.append("grows" if sprite.growth > 1 else "shrinks")
    if sprite.path == "still":
        return " and ".join(extra) if extra else "stands still"
    return " and ".join([f"{verbs[sprite.path]} {sprite.direction}", *extra])


def describe(scene: Scene, kind: str = "caption") -> str:
    """The words of a scene.

    kind: "caption" names the one or two foremost sprites, their motion, the background and the camera; "subject" leaves
    out background and camera; "scene" leaves out the sprites. Raises ValueError for another kind.
    """
    choice("kind", kind, PROMPT_KINDS)
    foremost = scene.sprites[::-1][:_DESCRIBED_SPRITES]
    subjects = " and ".join(f"{subject_words(sprite)} {motion_words(sprite)}" for sprite in foremost)
    place = f"over {scene.background} the camera {scene.camera.move}"
    return {"caption": f"{subjects} {place}", "subject": subjects, "scene": place}[kind]
