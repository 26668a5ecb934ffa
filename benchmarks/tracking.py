"""Ablation of the tracker on generated clips with exact truth: one option changed at a time, and what it has to beat.

    .venv/bin/python benchmarks/tracking.py --output benchmarks/results/tracking.json

TAP-Vid's metric in frames of 256 x 256, queries on frame 0: average share of points within 1, 2, 4, 8 and 16 pixels,
average Jaccard and visibility accuracy, as means over clips with 95 % bootstrap intervals, and the paired differences
to the default and to DiffTrack's published procedure. Every clip of every row is written as it is done (--parts), so
that a run that was killed goes on where it stopped, and several processes can share the work (--shard 1/2).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from experiment import Record, facts_apart, interval, kept, new_parser, share_of, weights_digest, write_json

from corrdit import PointTracker, Tracks, load_backbone
from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation.scoring import evaluate_video
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.feature_backbone import FeatureBackbone
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.tracking.baselines import nearest_patches, standing_still
from corrdit.tracking.pseudo_truth import lucas_kanade

SEEDS = {"report": 2_000_000_000, "tune": 2_050_000_000}
FIGURES = (
    "average_pts_within_thresh",
    "average_jaccard",
    "occlusion_accuracy",
    *(f"pts_within_{threshold}" for threshold in (1, 2, 4, 8, 16)),
)
COMPARED = ("average_pts_within_thresh", "average_jaccard")
Track = Callable[[np.ndarray, np.ndarray], Tracks]


@dataclass(frozen=True)
class Variant:
    """A row: a tracker of `TRACKERS` with options."""

    name: str
    kind: str
    options: Record


def _features(backbone: Backbone, options: Record) -> Track:
    given = dict(options)
    read = FeatureBackbone(backbone, given.pop("feature"))
    layer = given.pop("layer", backbone.preset.reading.layer)
    return PointTracker(read, layer=layer, head_weights=(), heads="logits", **given).track


TRACKERS: dict[str, Callable[[Backbone, Record], Track]] = {
    "tracker": lambda backbone, options: PointTracker(backbone, **options).track,
    "features": _features,
    "patches": lambda backbone, options: nearest_patches,
    "still": lambda backbone, options: lambda video, queries: standing_still(queries, len(video)),
    "lucas-kanade": lambda backbone, options: lucas_kanade,
}


def released_temperature(backbone: Backbone) -> float:
    """The released tracking code scales products by the number of heads to the -1/2 in place of their size."""
    config = backbone.transformer.config
    return float((config.attention_head_dim / config.num_attention_heads) ** 0.5)


def variants(backbone: Backbone) -> list[Variant]:
    """All rows for a backbone; its preset's own options for the tracker are the default that rows change."""
    own = dict(backbone.preset.described()["tracking"])
    mean = {**own, "layers": (), "layer": backbone.preset.reading.layer, "head_weights": ()}
    mean.pop("layers")
    published = {"preset": "published", "temperature": released_temperature(backbone)}
    filtered = [(f"low-pass {spread:g}", {"low_pass": spread}) for spread in (0.4, 0.8)]
    changed: list[tuple[str, Record]] = [
        ("default", {}),
        ("mean over all heads of one layer", {**mean, "heads": "logits"}),
        ("mean of softmaxes over its heads", {**mean, "heads": "probabilities"}),
        ("mean of softmaxes, heads as default", {"heads": "probabilities"}),
        ("median over heads of positions", {"combine": "median"}),
        ("temperature 4", {"temperature": 4.0}),
        *filtered,
        ("two timesteps", {"steps": (-1, -4)}),
        ("noisy latents", {"noise": True}),
        ("noisy latents, step -4", {"noise": True, "step": -4}),
        ("inverted latents", {"inversion": "ddim"}),
        ("inverted latents, step -4", {"inversion": "ddim", "step": -4}),
        ("one direction", {"bidirectional": False}),
        ("no sub-token refinement", {"refine": 0}),
        ("refinement radius 2", {"refine": 2}),
        ("every frame by itself", {"path_spread": 0.0}),
        ("no crops", {"crops": ()}),
        ("crops at 1/2", {"crops": (0.5,)}),
        ("crops at 1/2 and 1/4", {"crops": (0.5, 0.25)}),
        ("visibility by the whole frame only", {"crop_tolerance": 100.0}),
        ("everything visible", {"visibility": "all"}),
        ("published procedure", published),
        ("published, frames not 256 x 256 first", {**published, "resize_first": None}),
        ("published, products by head size", {"preset": "published"}),
    ]
    rows = [Variant(name, "tracker", options) for name, options in changed]
    rows += [
        Variant(f"features, {feature}", "features", {"feature": feature, "temperature": 8.0, "bidirectional": True})
        for feature in ("attention output", "projected output")
    ]
    rows += [Variant("nearest patch of 7 x 7", "patches", {}), Variant("standing still", "still", {})]
    if importlib.util.find_spec("cv2") is not None:
        rows.append(Variant("Lucas-Kanade", "lucas-kanade", {}))
    return rows


def parsed_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
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
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    backbone = load_backbone(arguments.pipeline)
    rows = chosen_variants(backbone, arguments)
    parts = arguments.parts or arguments.output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    digest = model_digest(backbone)
    shard, shards = share_of(arguments.shard)
    records: dict[str, list[Record]] = {variant.name: [] for variant in rows}
    missing = 0
    for clip in range(arguments.clips):
        sample = functools.cache(functools.partial(clip_sample, clip, arguments))
        for variant in rows:
            file = parts / f"{key(variant, clip, digest, arguments)}.json"
            make = functools.partial(measured, variant, backbone, clip, sample)
            record = kept(file, make, begin=clip % shards == shard - 1)
            missing += record is None
            records[variant.name].append(record)
    if missing:
        print(f"{missing} results of other shards are missing")
    else:
        write_table(arguments, backbone.name, rows, records, digest)


def chosen_variants(backbone: Backbone, arguments: argparse.Namespace) -> list[Variant]:
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


def model_digest(backbone: Backbone) -> str:
    """Of the transformer's weights and of the settings it is read with."""
    text = repr(backbone.preset) + weights_digest(backbone.transformer)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def measured(variant: Variant, backbone: Backbone, clip: int, sample: Callable[[], TapVidSample]) -> Record:
    video = sample()
    began = time.process_time()
    record = evaluate_video(TRACKERS[variant.kind](backbone, variant.options), video).record
    figures = {name: record["figures"][name] for name in FIGURES}
    row = {"variant": variant.name, **figures, "processor_seconds": round(time.process_time() - began, 2)}
    print(clip, json.dumps(row), flush=True)
    return row


def write_table(
    arguments: argparse.Namespace, model: str, rows: list[Variant], records: dict[str, list[Record]], digest: str
) -> None:
    clips = {
        "count": arguments.clips,
        "first_seed": SEEDS[arguments.seeds],
        "size": list(arguments.size),
        "points": arguments.points**2,
    }
    table = [
        {"variant": row.name, "kind": row.kind, "options": row.options, **summary(row.name, records)} for row in rows
    ]
    result = {**facts_apart(), "model": {"name": model, "digest": digest}, "clips": clips, "rows": table}
    write_json(arguments.output, result)
    print_table(table)


def summary(name: str, records: dict[str, list[Record]]) -> Record:
    """Means over clips with intervals, and paired differences to the default and the published procedure."""
    mine = records[name]
    result: Record = {figure: rounded_interval([one[figure] for one in mine]) for figure in FIGURES}
    for other in ("default", "published procedure"):
        if other in records and other != name:
            for figure in COMPARED:
                difference = [one[figure] - two[figure] for one, two in zip(mine, records[other], strict=True)]
                result[f"{figure}_minus_{other.split()[0]}"] = rounded_interval(difference)
    result["processor_seconds_a_clip"] = round(float(np.mean([one["processor_seconds"] for one in mine])), 2)
    return result


def rounded_interval(values: Sequence[float]) -> list[float]:
    """Clips without a case for a ratio are left out."""
    return [round(value, 4) for value in interval([value for value in values if not np.isnan(value)])]


def print_table(table: list[Record]) -> None:
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
