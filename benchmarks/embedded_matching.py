"""Measure how well the embedded model's attention finds corresponding points, on held-out generated videos.

    python benchmarks/embedded_matching.py --output benchmarks/results/embedded_matching.json

Visible points that moved by more than 1.5 tokens from the first frame, found within one token: for every layer and
head, for features, noisy patches and standing still, with bootstrap intervals over videos; at the size of training,
there also refined between tokens (`ops.match` with refine=1), and at 24 frames of 480 x 720 encoded at a working grid
of 20 x 30 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import diffusers
import torch

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.training.evaluation import matching_table, summary
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig

TIMESTEPS = (50, 300, 600)
LARGE_TIMESTEPS = (19, 100, 300)
LARGE = WorldConfig(frames=24, height=480, width=720)
LARGE_WORKING = (80, 120)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--pipeline", default=None, help="folder of a trained pipeline; the shipped one otherwise")
    parser.add_argument("--videos", type=int, default=200, help="held-out videos at the size of training")
    parser.add_argument("--large-videos", type=int, default=8, help="held-out videos of 24 frames of 480 x 720")
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """Command, commit, versions and machine, for the record."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    return {
        "command": " ".join(["python", f"benchmarks/{pathlib.Path(__file__).name}", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "cpu_cores": os.cpu_count(),
    }


def print_summary(title: str, table: dict[str, Any]) -> None:
    print(f"{title}: {table['videos']} videos, {table['points']} moved points")
    for timestep, rows in table["summary"].items():
        for kind, row in rows.items():
            text = f"{row['share']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"  t = {timestep:>4}  {kind:<19} {text}  ({row['reading']})")


def measured(
    pipe: Any, config: WorldConfig, seeds: range, timesteps: tuple[int, ...], **options: Any
) -> dict[str, Any]:
    began = time.perf_counter()
    table = matching_table(pipe, config, seeds, timesteps, **options)
    table["summary"] = summary(table["readings"])
    table["seconds"] = round(time.perf_counter() - began, 1)
    return table


def main() -> None:
    arguments = parsed_arguments()
    pipe = load_embedded_pipeline(arguments.pipeline)
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + arguments.videos)
    result: dict[str, Any] = {"environment": environment(), "first_seed": HELD_OUT_SEEDS}
    result["training_size"] = measured(pipe, WorldConfig(), seeds, TIMESTEPS, refined=True)
    print_summary("8 frames of 32 x 32", result["training_size"])
    if arguments.large_videos:
        large_seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + arguments.large_videos)
        result["large"] = measured(pipe, LARGE, large_seeds, LARGE_TIMESTEPS, working=LARGE_WORKING, batch=1)
        print_summary("24 frames of 480 x 720 at 20 x 30 tokens", result["large"])
    output = pathlib.Path(arguments.output)
    fresh = output.with_suffix(".part")
    fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, output)


if __name__ == "__main__":
    main()
