"""Find where the embedded model's correspondence is best for tracking, and write it as a preset.json.

    python benchmarks/embedded_preset.py --pipeline FOLDER --output preset.json

Reads validation videos (not those of embedded_matching.py) at the working size of real videos, 20 x 30 tokens, in
chunks of eight frames: every layer's mean over heads and every single head, at several steps, of clean and of noised
latents.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.loading import PRESET_FILE, WEIGHTS
from corrdit.integrations.embedded.training.evaluation import HELD_OUT_SEEDS, matching_table
from corrdit.integrations.embedded.world import WorldConfig

VALIDATION_SEEDS = HELD_OUT_SEEDS + 1_000_000
INFERENCE_STEPS = 50
STEPS = (-1, -3, -5, -8, -12)
CHUNK = 8
WORLD = WorldConfig(frames=CHUNK, height=160, width=240)
WORKING = (80, 120)
TOKEN_AREA = 16


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--pipeline", default=None, help="folder of a trained pipeline; the shipped one otherwise")
    parser.add_argument("--videos", type=int, default=8)
    return parser.parse_args()


def candidates(pipe: Any, videos: int) -> list[dict[str, Any]]:
    """Share matched of every reading at every step, the best first."""
    pipe.scheduler.set_timesteps(INFERENCE_STEPS)
    timesteps = {step: int(pipe.scheduler.timesteps[step]) for step in STEPS}
    seeds = range(VALIDATION_SEEDS, VALIDATION_SEEDS + videos)
    found = []
    for noisy in (False, True):
        table = matching_table(pipe, WORLD, seeds, tuple(timesteps.values()), working=WORKING, batch=1, noisy=noisy)
        for step, timestep in timesteps.items():
            for reading, row in table["readings"][str(timestep)].items():
                found.append({"reading": reading, "step": step, "timestep": timestep, "noise": noisy, **row})
    return sorted(found, key=lambda row: -row["share"])


def preset_of(row: dict[str, Any], videos: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """The entries `load_backbone` reads, and what they were chosen by.

    before: the pipeline's preset so far; its options of tracking and of motion transfer were chosen for its layer,
    and are kept if the layer is the same.
    """
    _, layer, kind, *head = row["reading"].split()
    size = f"{WORKING[0]} x {WORKING[1]}"
    names = ("tracking", "transfer") if before.get("layer") == int(layer) else ()
    kept = {name: before[name] for name in names if name in before}
    return {
        "layer": int(layer),
        "head": int(head[0]) if kind == "head" else None,
        "heads": "probabilities",
        "step": row["step"],
        "inference_steps": INFERENCE_STEPS,
        "noise": row["noise"],
        "frames_per_chunk": CHUNK,
        "tokens_per_frame": WORKING[0] * WORKING[1] // TOKEN_AREA,
        "source": f"best of all layers and heads on {videos} generated validation videos at {size}",
        "timestep": row["timestep"],
        "validation_share_within_one_token": round(row["share"], 4),
        **kept,
    }


def main() -> None:
    arguments = parsed_arguments()
    pipe = load_embedded_pipeline(arguments.pipeline)
    rows = candidates(pipe, arguments.videos)
    for row in rows[:12]:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    best = next(row for row in rows if row["reading"].startswith("query-key"))
    for kind in ("mean", "block", "attention", "patches"):
        print(next(row for row in rows if kind in row["reading"]))
    output = pathlib.Path(arguments.output)
    fresh = output.with_suffix(".part")
    there = (WEIGHTS if arguments.pipeline is None else pathlib.Path(arguments.pipeline)) / PRESET_FILE
    before = json.loads(there.read_text(encoding="utf-8")) if there.is_file() else {}
    fresh.write_text(json.dumps(preset_of(best, arguments.videos, before), indent=2) + "\n", encoding="utf-8")
    os.replace(fresh, output)


if __name__ == "__main__":
    main()
