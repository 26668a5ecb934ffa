"""Does the sprite of a generated video move the way its prompt says?

    python benchmarks/embedded_directions.py --output benchmarks/results/embedded_directions.json --shards FOLDER

Prompts are the captions of held-out scenes with one sprite on a straight path under a camera that is still. The
direction is measured by block matching (sprite_direction.py) and is right within 45 degrees, which a random direction
is one time in four; where nothing moves apart from the background it counts as wrong. The same measure on the rendered
videos of the same captions tells how far the tracker can be trusted.

Several guidance scales or numbers of steps may be given; --tuning takes other scenes, to choose among them. Shards that
are there are not made again, so a run may be stopped at any time; with --part 0/2 and --part 1/2 two processes of one
thread each share the work, and the one that finds all shards there writes the output.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib

import numpy as np
import torch
from experiment import Record, facts_apart, kept, new_parser, sampled, share_of, weights_digest, write_json
from sprite_direction import angle_to, sprite_motion

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.training.evaluation import bootstrap
from corrdit.integrations.embedded.world import WorldConfig, describe, generate
from corrdit.integrations.embedded.world.scene import DIRECTIONS, Scene, subject_words

WORLD = WorldConfig(sprites=(1, 1))
FIRST_SEED, TUNING_SEED = 1_000_500_000, 1_000_600_000
GROUP = 10
NEAR_DEGREES = 45.0
RENDERED = "rendered"
WORDS = ("caption", "short")


def parsed_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, pipeline=True)
    parser.add_argument("--shards", type=pathlib.Path, required=True, help="folder for parts of the result")
    parser.add_argument("--samples", type=int, default=200, help=f"videos, rounded up to a multiple of {GROUP}")
    parser.add_argument("--guidance", type=float, nargs="+", default=[6.0], help="guidance scales")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="numbers of inference steps")
    parser.add_argument("--words", nargs="+", choices=WORDS, default=["caption"], help="short leaves out the camera")
    parser.add_argument("--tuning", action="store_true", help="other scenes, to choose guidance and steps on")
    parser.add_argument("--part", default="0/1", help="which shards this process makes, as 0/2 and 1/2")
    return parser.parse_args(words)


@functools.cache
def prompted_scenes(count: int, first_seed: int) -> tuple[Scene, ...]:
    """The first scenes from a seed on with one sprite on a plain straight path and a camera that is still."""
    scenes = (WORLD.scene(seed) for seed in itertools.count(first_seed))
    plain = (
        scene
        for scene in scenes
        if scene.camera.move == "is still"
        and describe(scene, "subject") == f"{subject_words(scene.sprites[0])} moves {scene.sprites[0].direction}"
    )
    return tuple(itertools.islice(plain, count))


def prompt_of(scene: Scene, words: str) -> str:
    """The scene's caption, or the same without the camera."""
    return describe(scene) if words == "caption" else f"{describe(scene, 'subject')} over {scene.background}"


def videos_of(pipe: EmbeddedVideoPipeline, scenes: tuple[Scene, ...], setting: Record) -> np.ndarray:
    """uint8 [B, T, H, W, 3], rendered or generated; a sample's noise follows from its scene's seed."""
    seeds = [scene.seed for scene in scenes]
    if setting["words"] == RENDERED:
        return np.stack([clip.video for clip in generate(seeds, WORLD)])
    size = {"num_frames": WORLD.frames, "height": WORLD.height, "width": WORLD.width}
    call = {"num_inference_steps": setting["steps"], "guidance_scale": setting["guidance"]}
    return sampled(pipe, [prompt_of(scene, setting["words"]) for scene in scenes], seeds, **call, **size)


def settings_of(arguments: argparse.Namespace) -> list[Record]:
    """The rendered videos, and every combination of words, guidance and steps."""
    combinations = itertools.product(arguments.words, arguments.guidance, arguments.steps)
    generated = [{"words": words, "guidance": scale, "steps": steps} for words, scale, steps in combinations]
    return [{"words": RENDERED}, *generated]


def shard_path(arguments: argparse.Namespace, setting: Record, group: int, weights: str) -> pathlib.Path:
    """A name that says the weights, the setting, the set of scenes and the group."""
    source = RENDERED if setting["words"] == RENDERED else weights
    words = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in setting.values())
    return arguments.shards / f"{source}-{'tuning' if arguments.tuning else 'test'}-{words}-{group:03d}.json"


def made_shard(pipe: EmbeddedVideoPipeline, scenes: tuple[Scene, ...], setting: Record) -> list[Record]:
    rows = []
    for scene, video in zip(scenes, videos_of(pipe, scenes, setting), strict=True):
        motion = sprite_motion(video)
        velocity = [round(float(part), 3) for part in motion.velocity] if np.isfinite(motion.velocity).all() else None
        direction = scene.sprites[0].direction
        rows.append({"seed": scene.seed, "direction": direction, "velocity": velocity, "points": motion.points})
    return rows


def measured(rows: list[Record]) -> Record:
    """Shares, angles and chance of all samples of one setting."""
    velocities = [np.array(row["velocity"] or [np.nan, np.nan]) for row in rows]
    names = [row["direction"] for row in rows]
    angles = np.array([angle_to(velocity, name) for velocity, name in zip(velocities, names, strict=True)])
    once = np.ones(len(rows), dtype=np.int64)
    by_direction = {
        name: {"samples": names.count(name), "share": round(float((angles <= NEAR_DEGREES)[chosen].mean()), 4)}
        for name in DIRECTIONS
        if (chosen := np.array([name == other for other in names])).any()
    }
    return {
        "samples": len(rows),
        "within_45_degrees": bootstrap((angles <= NEAR_DEGREES).astype(np.int64), once),
        "median_angle": round(float(np.median(angles)), 1),
        "nothing_moves_apart": sum(row["velocity"] is None for row in rows),
        "by_direction": by_direction,
    }


def main(words: list[str] | None = None) -> None:
    arguments = parsed_arguments(words)
    torch.set_num_threads(1)
    part, parts = share_of(arguments.part)
    arguments.shards.mkdir(parents=True, exist_ok=True)
    pipe = load_embedded_pipeline(arguments.pipeline)
    weights = weights_digest(pipe.transformer)
    groups = -(-arguments.samples // GROUP)
    scenes = prompted_scenes(groups * GROUP, TUNING_SEED if arguments.tuning else FIRST_SEED)
    turns = itertools.cycle(range(parts))
    results, missing = [], 0
    for setting in settings_of(arguments):
        rows: list[Record] = []
        for group in range(groups):
            path = shard_path(arguments, setting, group, weights)
            make = functools.partial(made_shard, pipe, scenes[GROUP * group : GROUP * (group + 1)], setting)
            found = kept(path, make, begin=next(turns) == part)
            missing += found is None
            rows += found or []
        results.append((setting, rows))
    if missing:
        print("shards of other processes are missing; the last one to end writes the output")
        return
    result = {
        **facts_apart(),
        "weights": weights,
        "scenes": "tuning" if arguments.tuning else "test",
        "results": [{**setting, **measured(rows)} for setting, rows in results],
    }
    write_json(arguments.output, result)
    for row in result["results"]:
        share = row["within_45_degrees"]
        print({name: row[name] for name in ("words", "guidance", "steps", "samples", "median_angle") if name in row})
        print(f"  within 45 degrees {share['share']:.3f} [{share['low']:.3f}, {share['high']:.3f}]")


if __name__ == "__main__":
    main()
