"""Error of the tracker with the embedded model on generated clips with exact truth, one option changed at a time.

    .venv/bin/python benchmarks/tracking.py --videos 24 --output benchmarks/results/tracking.json

Each row has the options, the share of positions within 2, 4 and 8 pixels and the median error over visible points that
moved by more than 8 pixels, with 95 % bootstrap intervals over clips, and how often visibility is called right.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch

from corrdit import PointTracker, load_backbone
from corrdit.benchmark.environment import environment
from corrdit.data import WorldConfig, generate
from corrdit.files import written_beside
from corrdit.tracking.baselines import nearest_patches, standing_still

MOVED_PIXELS = 8.0
THRESHOLDS = (2.0, 4.0, 8.0)
FIRST_SEED = 2_000_000_000
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no refinement": {"refine": 0},
    "refine 2": {"refine": 2},
    "every frame by itself": {"path_spread": 0.0},
    "one direction": {"bidirectional": False},
    "mean over heads": {"head_weights": ()},
    "noisy latents": {"noise": True, "step": -3},
    "published procedure": {"preset": "published", "resize_first": None},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--size", type=int, nargs=3, default=(20, 160, 240), metavar=("T", "H", "W"))
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=JSON", help="tracker options for every variant")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    frames, height, width = arguments.size
    config = WorldConfig(frames=frames, height=height, width=width, sprites=(2, 4))
    clips = [generate([FIRST_SEED + index], config)[0] for index in range(arguments.videos)]
    common = {name: json.loads(value) for name, value in (entry.split("=", 1) for entry in arguments.set)}
    backbone = load_backbone("embedded")
    rows = []
    for name in arguments.variants:
        tracker = PointTracker(backbone, **{**common, **VARIANTS[name]})
        rows.append({"variant": name, "options": {**common, **VARIANTS[name]}, **measured(tracker.track, clips)})
        print(json.dumps(rows[-1]), flush=True)
    for name, track in (
        ("nearest patch of 7 x 7", nearest_patches),
        ("standing still", lambda video, queries: standing_still(queries, len(video))),
    ):
        rows.append({"variant": name, "options": {}, **measured(track, clips)})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.output:
        record = {
            "command": " ".join(["benchmarks/tracking.py", *sys.argv[1:]]),
            "environment": environment(torch.device("cpu")),
            "clips": {"count": len(clips), "first_seed": FIRST_SEED, "size": list(arguments.size)},
            "rows": rows,
        }
        with written_beside(arguments.output) as file:
            file.write(json.dumps(record, indent=1).encode())


def measured(track: Any, clips: list[Any]) -> dict[str, Any]:
    """Pooled figures over all clips for one tracker."""
    errors, right, began = [], [], time.perf_counter()
    for clip in clips:
        height, width = clip.video.shape[1:3]
        queries = query_grid(12, height, width)
        tracks, truth = track(clip.video, queries), clip.tracks(queries)
        distance = np.linalg.norm(np.asarray(tracks.xy) - truth.xy, axis=-1)
        moved = np.linalg.norm(truth.xy - queries[None, :, 1:], axis=-1) > MOVED_PIXELS
        errors.append(distance[moved & truth.visible])
        right.append(float((np.asarray(tracks.visible) == truth.visible)[1:].mean()))
    result: dict[str, Any] = {"median": float(np.median(np.concatenate(errors)))}
    for threshold in THRESHOLDS:
        hits = np.array([[float((error <= threshold).sum()), float(len(error))] for error in errors])
        share = hits[:, 0].sum() / hits[:, 1].sum()
        drawn = np.random.default_rng(0).integers(0, len(hits), (1000, len(hits)))
        resampled = hits[drawn].sum(1)
        low, high = np.percentile(resampled[:, 0] / resampled[:, 1], (2.5, 97.5))
        result[f"within_{threshold:g}px"] = [round(float(value), 4) for value in (share, low, high)]
    result["visibility_accuracy"] = round(float(np.mean(right)), 4)
    result["positions"] = int(sum(len(error) for error in errors))
    result["seconds_a_clip"] = round((time.perf_counter() - began) / len(clips), 2)
    return result


def query_grid(side: int, height: int, width: int) -> np.ndarray:
    """float32 `[side * side, 3]` (frame 0, x, y), evenly spread."""
    x, y = np.meshgrid((np.arange(side) + 0.5) * width / side, (np.arange(side) + 0.5) * height / side)
    return np.stack([np.zeros(side * side), x.ravel(), y.ravel()], axis=1).astype(np.float32)


if __name__ == "__main__":
    main()
