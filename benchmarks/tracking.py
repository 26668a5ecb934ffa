"""Ablation of the tracker on generated clips with exact truth: one option changed at a time, and what it has to beat.

    .venv/bin/python benchmarks/tracking.py --output benchmarks/results/tracking.json

TAP-Vid's metric in frames of 256 x 256, queries on frame 0: average share of points within 1, 2, 4, 8 and 16 pixels,
average Jaccard and visibility accuracy, as means over clips with 95 % bootstrap intervals, and the paired differences
to the default and to DiffTrack's published procedure. Every clip of every row is written as it is done (--parts), so
that a run that was killed goes on where it stopped, and several processes can share the work (--shard 1/2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from tracking_trackers import TRACKERS, Variant, variants

from corrdit import load_backbone
from corrdit.benchmark.environment import environment
from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation.scoring import evaluate_video
from corrdit.files import written_beside
from corrdit.integrations.embedded.world import WorldConfig, generate

SEEDS = {"report": 2_000_000_000, "tune": 2_050_000_000}
FIGURES = (
    "average_pts_within_thresh",
    "average_jaccard",
    "occlusion_accuracy",
    *(f"pts_within_{threshold}" for threshold in (1, 2, 4, 8, 16)),
)
COMPARED = ("average_pts_within_thresh", "average_jaccard")
DRAWS = 2000


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="embedded", help="name of a backbone or folder of a pipeline")
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--seeds", choices=list(SEEDS), default="report", help="tune: clips for choosing options")
    parser.add_argument("--size", type=int, nargs=3, default=(16, 160, 240), metavar=("T", "H", "W"))
    parser.add_argument("--points", type=int, default=6, metavar="N", help="N x N points on the first frame")
    parser.add_argument("--variants", nargs="*", default=None, help="names of rows; all by default")
    parser.add_argument(
        "--add", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="a row of one's own"
    )
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="do every N-th clip only, from the I-th")
    parser.add_argument("--parts", type=pathlib.Path, help="folder of the single results; beside --output by default")
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="JSON file, written once all clips are there"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    backbone = load_backbone(arguments.pipeline)
    rows = chosen_variants(backbone, arguments)
    parts = arguments.parts or arguments.output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    digest = model_digest(backbone)
    files = {
        (variant.name, clip): parts / f"{key(variant, clip, digest, arguments)}.json"
        for variant in rows
        for clip in range(arguments.clips)
    }
    shard, shards = (int(number) for number in arguments.shard.split("/"))
    for clip in range(shard - 1, arguments.clips, shards):
        missing = [variant for variant in rows if not files[variant.name, clip].exists()]
        if missing:
            sample = clip_sample(clip, arguments)
            for variant in missing:
                record = measured(variant, backbone, sample)
                with written_beside(files[variant.name, clip], "w") as file:
                    json.dump(record, file)
                print(clip, json.dumps(record), flush=True)
    if all(file.exists() for file in files.values()):
        write_table(arguments, backbone, rows, files, digest)
    else:
        print(f"{sum(not file.exists() for file in files.values())} results of other shards are missing")


def chosen_variants(backbone: Any, arguments: argparse.Namespace) -> list[Variant]:
    known = {variant.name: variant for variant in variants(backbone)}
    unknown = sorted(set(arguments.variants or ()) - set(known))
    if unknown:
        raise SystemExit(f"unknown row {unknown[0]!r}; rows are {', '.join(known)}")
    added = [Variant(name, "tracker", json.loads(options)) for name, options in arguments.add]
    return [known[name] for name in (known if arguments.variants is None else arguments.variants)] + added


def key(variant: Variant, clip: int, digest: str, arguments: argparse.Namespace) -> str:
    """A file name that another model, another clip or other options do not have."""
    first = SEEDS[arguments.seeds]
    settings = [variant.kind, variant.options, digest, first + clip, list(arguments.size), arguments.points]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def model_digest(backbone: Any) -> str:
    """Of the transformer's weights and of the settings it is read with."""
    total = hashlib.sha256(repr(backbone.preset).encode())
    for name, weight in sorted(backbone.transformer.state_dict().items()):
        total.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def clip_sample(clip: int, arguments: argparse.Namespace) -> TapVidSample:
    frames, height, width = arguments.size
    config = WorldConfig(frames=frames, height=height, width=width, sprites=(2, 4))
    seed = SEEDS[arguments.seeds] + clip
    made = generate([seed], config)[0]
    side = arguments.points
    x, y = np.meshgrid((np.arange(side) + 0.5) * width / side, (np.arange(side) + 0.5) * height / side)
    queries = np.stack([np.zeros(side * side), x.ravel(), y.ravel()], axis=1)
    truth = made.tracks(queries)
    visible = truth.visible.T
    return TapVidSample(
        str(seed), made.video, queries, truth.xy.transpose(1, 0, 2), ~visible, np.arange(len(queries)), "first"
    )


def measured(variant: Variant, backbone: Any, sample: TapVidSample) -> dict[str, Any]:
    began = time.process_time()
    record = evaluate_video(TRACKERS[variant.kind](backbone, variant.options), sample).record
    figures = {name: record["figures"][name] for name in FIGURES}
    return {"variant": variant.name, **figures, "processor_seconds": round(time.process_time() - began, 2)}


def write_table(
    arguments: argparse.Namespace, backbone: Any, rows: list[Variant], files: dict[Any, pathlib.Path], digest: str
) -> None:
    values = {
        variant.name: [json.loads(files[variant.name, clip].read_text()) for clip in range(arguments.clips)]
        for variant in rows
    }
    table = [
        {"variant": row.name, "kind": row.kind, "options": row.options, **summary(row.name, values)} for row in rows
    ]
    record = {
        "command": " ".join(["benchmarks/tracking.py", *sys.argv[1:]]),
        "environment": environment(torch.device("cpu")),
        "model": {"name": backbone.name, "digest": digest},
        "clips": {
            "count": arguments.clips,
            "first_seed": SEEDS[arguments.seeds],
            "size": list(arguments.size),
            "points": arguments.points**2,
        },
        "rows": table,
    }
    with written_beside(arguments.output, "w") as file:
        json.dump(record, file, indent=1)
    print_table(table)


def summary(name: str, values: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over clips with intervals, and paired differences to the default and the published procedure."""
    result: dict[str, Any] = {
        figure: interval(np.array([record[figure] for record in values[name]], float)) for figure in FIGURES
    }
    for other in ("default", "published procedure"):
        if other in values and other != name:
            for figure in COMPARED:
                pairs = zip(values[name], values[other], strict=True)
                difference = np.array([one[figure] - two[figure] for one, two in pairs])
                result[f"{figure}_minus_{other.split()[0]}"] = interval(difference)
    result["processor_seconds_a_clip"] = round(float(np.mean([one["processor_seconds"] for one in values[name]])), 2)
    return result


def interval(values: np.ndarray) -> list[float]:
    """Mean over clips and its 95 % bootstrap interval; clips without a case for a ratio are left out."""
    values = values[~np.isnan(values)]
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return [round(float(value), 4) for value in (values.mean(), low, high)]


def print_table(table: list[dict[str, Any]]) -> None:
    print(f"{'':34}  <d avg                AJ    OA    <1    <2    <4    <8   <16   <d avg less default   s/clip")
    for row in table:
        mean, low, high = (100 * value for value in row["average_pts_within_thresh"])
        others = " ".join(f"{100 * row[figure][0]:5.1f}" for figure in FIGURES[1:])
        paired = row.get("average_pts_within_thresh_minus_default")
        text = "" if paired is None else "{:+5.1f} [{:+5.1f}, {:+5.1f}]".format(*(100 * value for value in paired))
        seconds = row["processor_seconds_a_clip"]
        print(f"{row['variant']:34} {mean:5.1f} [{low:5.1f}, {high:5.1f}] {others}   {text:22} {seconds:7.1f}")


if __name__ == "__main__":
    main()
