"""How correspondence emerges while the embedded model trains: matching accuracy of every checkpoint of a run.

    python benchmarks/embedded_emergence.py --run FOLDER --output benchmarks/results/embedded_emergence.json

FOLDER is what `corrdit train --output` wrote. The averaged weights of each checkpoint, which are what is exported, are
read on validation videos (not those of embedded_matching.py), and the run's loss is averaged over stretches of steps.
Checkpoints that the output already holds are not measured again, so it can be run while the training goes on.
"""

from __future__ import annotations

import csv
import pathlib

import numpy as np
import torch
from experiment import Record, facts_apart, new_parser, read_json, write_json

from corrdit.integrations.embedded.pipeline import build_pipeline
from corrdit.integrations.embedded.training.evaluation import matching_table
from corrdit.integrations.embedded.training.recipe import load_checkpoint
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig

VALIDATION_SEEDS = HELD_OUT_SEEDS + 1_000_000
TIMESTEPS = (50, 300, 600)


def checkpoints(run: pathlib.Path, every: int) -> dict[int, pathlib.Path]:
    """The checkpoints of a run by step: the first, every so many steps, and the last."""
    found = {int(path.stem.split("-")[1]): path for path in (run / "checkpoints").glob("step-*.ckpt")}
    if not found:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no step-*.ckpt; give the output folder of a training run")
    ends = (min(found), max(found))
    return {step: path for step, path in sorted(found.items()) if step % every == 0 or step in ends}


def measured(checkpoint: pathlib.Path, step: int, videos: int) -> Record:
    """Share matched of every reading of the averaged weights, by timestep."""
    pipe = build_pipeline(load_checkpoint(checkpoint).average.eval())
    seeds = range(VALIDATION_SEEDS, VALIDATION_SEEDS + videos)
    table = matching_table(pipe, WorldConfig(), seeds, TIMESTEPS, batch=min(16, videos))
    shares = {
        timestep: {name: round(row["share"], 4) for name, row in readings.items()}
        for timestep, readings in table["readings"].items()
    }
    return {"step": step, "videos": videos, "points": table["points"], "shares": shares}


def losses(run: pathlib.Path, stretch: int) -> dict[str, list[float]]:
    """Mean loss over stretches of steps, {"steps": middles, "loss": means}, of all parts of a run; a step that was
    repeated after a kill counts once."""
    found: dict[int, float] = {}
    for path in sorted((run / "logs").glob("part_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1])):
        with path.open(encoding="utf-8") as file:
            found |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}
    steps = np.array(sorted(found), dtype=np.int64)
    values = np.array([found[step] for step in steps])
    means = {int(part): float(values[steps // stretch == part].mean()) for part in np.unique(steps // stretch)}
    return {
        "steps": [stretch * part + stretch // 2 for part in means],
        "loss": [round(mean, 5) for mean in means.values()],
    }


def main(words: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="folder of a training run")
    parser.add_argument("--videos", type=int, default=48)
    parser.add_argument("--every", type=int, default=400, help="steps between measured checkpoints")
    parser.add_argument("--stretch", type=int, default=50, help="steps the loss is averaged over")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    before = read_json(arguments.output) if arguments.output.is_file() else {}
    known = before["checkpoints"] if before.get("timesteps") == list(TIMESTEPS) else []
    rows = {row["step"]: row for row in known}
    wanted = checkpoints(arguments.run, arguments.every)
    todo = [step for step in wanted if step not in rows or rows[step]["videos"] != arguments.videos]
    for step in [*todo, None]:
        if step is not None:
            rows[step] = measured(wanted[step], step, arguments.videos)
            shares = rows[step]["shares"].items()
            best = {time: max(share for name, share in row.items() if name.endswith("mean")) for time, row in shares}
            print(f"step {step}: best layer {best}", flush=True)
        result = {
            **facts_apart(),
            "first_seed": VALIDATION_SEEDS,
            "timesteps": list(TIMESTEPS),
            "loss": losses(arguments.run, arguments.stretch),
            "checkpoints": [rows[step] for step in sorted(rows)],
        }
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
