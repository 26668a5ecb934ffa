"""Measure how well the embedded model's attention finds corresponding points, on held-out generated videos.

    python benchmarks/embedded_matching.py --output benchmarks/results/embedded_matching.json

Visible points that moved by more than 1.5 tokens from the first frame, found within one token: for every layer and
head, for features, noisy patches and standing still, with bootstrap intervals over videos; at the size of training,
there also refined between tokens (`ops.match` with refine=1), and at 24 frames of 480 x 720 encoded at a working grid
of 20 x 30 tokens.
"""

from __future__ import annotations

import time

import diffusers
from experiment import Record, facts, new_parser, write_json

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.training.evaluation import matching_table, summary
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig

TIMESTEPS = (50, 300, 600)
LARGE_TIMESTEPS = (19, 100, 300)
LARGE = WorldConfig(frames=24, height=480, width=720)
LARGE_WORKING = (80, 120)


def finished(title: str, table: Record, began: float) -> Record:
    """A table with its summary, which is printed, and the seconds since it was begun."""
    table["summary"] = summary(table["readings"])
    table["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{title}: {table['videos']} videos, {table['points']} moved points")
    for timestep, rows in table["summary"].items():
        for kind, row in rows.items():
            text = f"{row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"  t = {timestep:>4}  {kind:<19} {text}  ({row['reading']})")
    return table


def main() -> None:
    parser = new_parser(__doc__, pipeline=True)
    parser.add_argument("--videos", type=int, default=200, help="held-out videos at the size of training")
    parser.add_argument("--large-videos", type=int, default=8, help="held-out videos of 24 frames of 480 x 720")
    arguments = parser.parse_args()
    pipe = load_embedded_pipeline(arguments.pipeline)
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + arguments.videos)
    versions = {**facts(), "diffusers": diffusers.__version__}
    result: Record = {"environment": versions, "first_seed": HELD_OUT_SEEDS}
    began = time.perf_counter()
    table = matching_table(pipe, WorldConfig(), seeds, TIMESTEPS, refined=True)
    result["training_size"] = finished("8 frames of 32 x 32", table, began)
    if arguments.large_videos:
        large_seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + arguments.large_videos)
        began = time.perf_counter()
        table = matching_table(pipe, LARGE, large_seeds, LARGE_TIMESTEPS, working=LARGE_WORKING, batch=1)
        result["large"] = finished("24 frames of 480 x 720 at 20 x 30 tokens", table, began)
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
