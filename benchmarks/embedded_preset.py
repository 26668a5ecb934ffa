"""Find where the embedded model's correspondence is best for tracking, and write it as a preset.json.

    python benchmarks/embedded_preset.py --pipeline FOLDER --output preset.json

Reads validation videos (not those of embedded_matching.py) at the working size of real videos, 20 x 30 tokens, in
chunks of eight frames: every layer's mean over heads and every single head, at several steps, of clean and of noised
latents.
"""

from __future__ import annotations

import pathlib

from experiment import Record, new_parser, read_json, write_json

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline
from corrdit.integrations.embedded.preset import PRESET_FILE, WEIGHTS
from corrdit.integrations.embedded.training.evaluation import matching_table
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig

VALIDATION_SEEDS = HELD_OUT_SEEDS + 1_000_000
INFERENCE_STEPS = 50
STEPS = (-1, -3, -5, -8, -12)
CHUNK = 8
WORLD = WorldConfig(frames=CHUNK, height=160, width=240)
WORKING = (80, 120)
TOKEN_AREA = 16


def candidates(pipe: EmbeddedVideoPipeline, videos: int) -> list[Record]:
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


def preset_of(row: Record, videos: int, before: Record) -> Record:
    """The entries `load_backbone` reads, and what they were chosen by.

    before: the pipeline's preset so far; its options of tracking were chosen for its layer, and are kept if the layer
    is the same. Those of motion transfer are moved to the layer.
    """
    _, layer, kind, *head = row["reading"].split()
    size = f"{WORKING[0]} x {WORKING[1]}"
    names = ("tracking",) if before.get("layer") == int(layer) else ()
    kept = {name: before[name] for name in names if name in before}
    if "transfer" in before:
        kept["transfer"] = {**before["transfer"], "blocks": [int(layer)]}
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
    parser = new_parser(__doc__, pipeline=True)
    parser.add_argument("--videos", type=int, default=8)
    arguments = parser.parse_args()
    pipe = load_embedded_pipeline(arguments.pipeline)
    rows = candidates(pipe, arguments.videos)
    for row in rows[:12]:
        print({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
    best = next(row for row in rows if row["reading"].startswith("query-key"))
    for kind in ("mean", "block", "attention", "patches"):
        print(next(row for row in rows if kind in row["reading"]))
    there = (WEIGHTS if arguments.pipeline is None else pathlib.Path(arguments.pipeline)) / PRESET_FILE
    before = read_json(there) if there.is_file() else {}
    write_json(arguments.output, preset_of(best, arguments.videos, before), indent=2)


if __name__ == "__main__":
    main()
