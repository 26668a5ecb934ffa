"""Does motion transfer work? Measured on the embedded model, where the reference's motion is known exactly.

    for share in 0 1; do python benchmarks/transfer_quality.py --part main region steady memory --shard $share/2 & done
    wait; python benchmarks/transfer_quality.py --report

Parts: main (every method), region (fidelity inside and outside of an object's mask), steady (how steady a generation
without a reference is), memory (peak of the allocator in a guided step), ablations, zero-shot, appendix-d, and tuning
(other references, on which rates were chosen). Each row is appended to a file as soon as it is there, so a run may be
stopped and goes on; rows of other weights count for nothing. `--shard 0/4` takes every fourth reference. `--report`
sums all rows up, with paired bootstrap intervals over references.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from experiment import CPU, RESULTS, Record, facts, interval, new_parser, share_of, weights_digest, write_json
from transfer_world import (
    FIRST_SEED,
    SIZE,
    TUNING_SEED,
    Case,
    adherence,
    case_of,
    measures,
    moved_frame,
    region_case_of,
    region_fidelity,
)
from video_measures import measures as video_measures

from corrdit import MotionTransfer, load_backbone, motion
from corrdit.benchmark.environment import environment
from corrdit.benchmark.measure import peak_extra_bytes
from corrdit.integrations.diffusers.backbones.base import Backbone

KINDS = ("caption", "subject", "scene")
REFERENCES = {
    **{"main": 40, "region": 16, "steady": 24, "memory": 2},
    **{"ablations": 8, "zero-shot": 16, "appendix-d": 64, "tuning": 8},
}
"""Of each part; the first four together take about 20 minutes on two cores."""
BACKBONE, DEFAULT, ZERO_SHOT = "backbone", "block 4", ", zero-shot"
# Steps, guidance and learning rates are the preset's, which were chosen on other references (`--part tuning`).
MAIN: dict[str, Record] = {
    "backbone": {"method": "backbone"},
    "injection": {"method": "injection", "injection_blocks": (0,)},
    "query injection": {"method": "query-injection", "injection_blocks": (0,)},
    "smm": {"method": "smm", "loss": "paper"},
    "smm released": {"method": "smm", "loss": "released", "learning_rate": 0.02},
    "moft": {"method": "moft"},
    "motionclone": {"method": "motionclone"},
    "ditflow latents": {"method": "ditflow"},
    "ditflow embeddings": {"method": "ditflow", "optimise": "embedding", "learning_rate": 0.02},
    "flowmotion": {"method": "flowmotion"},
    # FastVMT's settings at the embedded model's 8 x 8 tokens; its schedule begins at the reference.
    "fastvmt": {
        **{"window": 3, "tile": (2, 2), "span": (0, 3), "distance_weights": (1.0, 0.8), "tracking_weight": 0.2},
        **{
            "loss": "pairs",
            "flow_reference": "soft",
            "temperature": 1.0,
            "reference_noised": True,
            "optimizer": "adamw",
        },
        **{"optimisation_steps": 10, "optimiser_interval": 3, "rate_falls": "optimisation steps", "strength": 0.75},
    },
}
REGION = ("ditflow latents", "smm", "moft", "motionclone", "flowmotion")
RATES = (0.02, 0.05, 0.1, 0.2)
STEADY_RATES = (0.001, 0.002, 0.005, 0.01)
STEADY: dict[str, Record] = {"backbone": {"method": "backbone"}, "steady": {"method": "steady"}}
ABLATIONS: dict[str, Record] = {
    **{f"block {block}": {"blocks": (block,)} for block in range(6)},
    "blocks 3+4+5": {"blocks": (3, 4, 5)},
    **{f"share {share}": {"guided_share": share} for share in (0.1, 0.4, 0.8, 1.0)},
    **{f"optimisation steps {count}": {"optimisation_steps": count} for count in (1, 10)},
    **{f"temperature {value}": {"temperature": float(value)} for value in (1, 5, 10)},
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
    "soft reference": {"flow_reference": "soft"},
    "paper's loss": {"loss": "paper"},
    "paper's heads": {"heads": "features"},
    "with injection": {"injection_blocks": (0,)},
    "span 1": {"span": 1},
    "window 2": {"window": 2},
    "window 2 round tiles of 2": {"window": 2, "tile": 2},
    "gradient every 2nd step": {"gradient_interval": 2},
    "gradient every 3rd optimisation step": {"optimiser_interval": 3},
    "reference noised": {"reference_noised": True},
    "guided from 0.1 on": {"guided_start": 0.1},
    **{f"learning rate {rate}": {"learning_rate": rate} for rate in (0.02, 0.1, 0.2)},
}


def tuned() -> dict[str, Record]:
    """Learning rates of each method, where FastVMT's schedule begins, and blocks of DiTFlow."""
    configurations: dict[str, Record] = {
        f"{name} at {rate}": {**settings, "learning_rate": rate}
        for name, settings in MAIN.items()
        if name not in ("backbone", "injection", "query injection")
        for rate in RATES
    }
    configurations |= {f"fastvmt from {share}": {**MAIN["fastvmt"], "strength": share} for share in (0.9, 1.0)}
    configurations |= {f"steady at {rate}": {"method": "steady", "learning_rate": rate} for rate in STEADY_RATES}
    configurations |= {f"ditflow block {block}": {"blocks": (block,)} for block in (2, 3, 5)}
    return {"backbone": MAIN["backbone"], **configurations}


CONFIGURATIONS = {"main": MAIN, "ablations": ABLATIONS, "tuning": tuned()}
"""Parts that measure each of these on every reference; the others have a loop of their own."""


def parsed_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, output=False)
    parser.add_argument("--part", nargs="+", choices=list(REFERENCES), default=["main"])
    parser.add_argument("--report", action="store_true", help="sum up the rows instead of measuring")
    parser.add_argument("--references", type=int, default=None, help=f"{REFERENCES} where left out")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "empty"], default=None, help="kinds of prompt, in turn")
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=pathlib.Path, default=RESULTS / "transfer_quality_rows.jsonl")
    parser.add_argument("--summary", type=pathlib.Path, default=RESULTS / "transfer_quality.json")
    parser.add_argument("--only", nargs="+", default=None, help="names of some configurations")
    return parser.parse_args()


Measured = dict[tuple[int, str], Record]
"""Rows of one configuration by reference and kind of prompt."""


class Rows:
    """Finished rows in a file of JSON lines, one added at a time; of all in it only those of some weights count."""

    def __init__(self, path: pathlib.Path, weights: str) -> None:
        self.path, self.made_with = path, {"weights": weights, "commit": environment(CPU)["commit"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        self.all = [row for row in found if row.get("weights") == weights]
        self.done = {self.key(row) for row in self.all}

    @staticmethod
    def key(row: Record) -> tuple[object, ...]:
        return (row["part"], row["name"], row["index"], row["kind"])

    def lacks(self, row: Record) -> bool:
        return self.key(row) not in self.done

    def add(self, row: Record) -> None:
        row = {**row, **self.made_with}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.all.append(row)
        self.done.add(self.key(row))


def measured(backbone: Backbone, case: Case, prompt: str, settings: Record, index: int) -> Record:
    transfer = MotionTransfer(backbone, **settings)
    began = time.process_time()
    if transfer.settings.method == "steady":
        return steadiness(transfer, prompt, index)
    result = transfer(case.video, prompt, seed=index)
    row = {"seconds": time.process_time() - began, **measures(case, result.video)}
    row["adherence"] = adherence(backbone, result.video, prompt, other_prompts(index))
    # Steps that use a gradient again have no loss of their own.
    losses = result.losses[np.isfinite(result.losses)]
    if losses.size:
        row |= {"first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    return row


def steadiness(transfer: MotionTransfer, prompt: str, index: int) -> Record:
    """What is left of blocks after the best displacement, how far patches can be followed, and how much moves."""
    size = {"num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    video = transfer(None, prompt, seed=index, **size).video
    frames = torch.as_tensor(video).permute(0, 3, 1, 2)[None].float() / 255
    return {key: float(value) for key, value in video_measures(frames).items()}


@functools.cache
def other_prompts(index: int) -> list[str]:
    """Scenes of other references."""
    return [case_of(index + 1 + other).prompts["scene"] for other in range(7)]


def run_configurations(
    arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int], part: str
) -> None:
    """Every configuration of a part; the kinds of prompt take turns over the references unless some are asked for, and
    tuning has references that are not used again."""
    tuning, configurations = part == "tuning", CONFIGURATIONS[part]
    for index in indices:
        case = case_of(index, TUNING_SEED if tuning else FIRST_SEED)
        for kind in ["scene"] if tuning else arguments.kinds or [KINDS[index % len(KINDS)]]:
            for name in arguments.only or configurations:
                row = {"part": part, "name": name, "index": index, "kind": kind}
                if rows.lacks(row):
                    rows.add({**row, **measured(backbone, case, case.prompts[kind], configurations[name], index)})
            if tuning and rows.lacks(row := {"part": part, "name": "plain", "index": index, "kind": "scene"}):
                plain = MotionTransfer(backbone, **STEADY[BACKBONE])
                rows.add({**row, **steadiness(plain, case.prompts["scene"], index)})


def run_zero_shot(arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int]) -> None:
    """Optimise with the caption, inject into another scene, beside optimising for that scene."""
    methods = {name: MAIN[name] for name in ("ditflow latents", "ditflow embeddings", "smm")}
    for index in indices:
        case = case_of(index)
        prompt = case.prompts["scene"]
        others = other_prompts(index)
        for name, settings in {BACKBONE: MAIN[BACKBONE], **methods}.items():
            transfer = MotionTransfer(backbone, **settings)
            for suffix in ("", ZERO_SHOT):
                row = {"part": "zero-shot", "name": name + suffix, "index": index, "kind": "scene"}
                if not rows.lacks(row) or row["name"] == f"{BACKBONE}{ZERO_SHOT}":
                    continue
                if suffix:
                    stored = transfer(case.video, case.prompts["caption"], seed=index).optimised
                    video = transfer(None, prompt, stored=stored, seed=index).video
                else:
                    video = transfer(case.video, prompt, seed=index).video
                explained = adherence(backbone, video, prompt, others)
                rows.add({**row, **measures(case, video), "adherence": explained})


def run_appendix_d(arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int]) -> None:
    """Agreement of the attention motion flow of a moved picture with the known motion, by block."""
    layers = tuple(range(backbone.layers))
    transfer = MotionTransfer(backbone, block=layers, steps=1)
    for index in indices:
        row = {"part": "appendix-d", "index": index, "kind": ""}
        if not rows.lacks({**row, "name": "latents"}):
            continue
        video, step = moved_frame(index)
        reference = transfer.reference_motion(video)
        flows = {f"block {block}": flow for block, flow in reference.flows.items()}
        _, patch, _ = backbone.layout().patch_size(backbone.transformer)
        flows["latents"] = motion.latent_displacement(reference.latents, patch=patch)
        for name, flow in flows.items():
            frames = flow.shape[0]
            forward = [(i, j) for i in range(frames) for j in range(i + 1, frames)]
            agreement = [motion.direction_agreement(inside(flow[i, j], (j - i) * step, 4), step) for i, j in forward]
            next_frames = [motion.direction_agreement(inside(flow[i, i + 1], step, 4), step) for i in range(frames - 1)]
            means = {"agreement": float(np.mean(agreement)), "next_frame": float(np.mean(next_frames))}
            rows.add({**row, "name": name, **means})


def run_region(arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int]) -> None:
    """Fidelity inside and outside of an object's mask: without transfer, with one everywhere, with one in the mask."""
    for index in indices:
        region = region_case_of(index)
        prompt = region.case.prompts["scene"]
        names = {name: name for name in (BACKBONE, *REGION)} | {f"{name}, in the mask": name for name in REGION}
        for label, name in names.items():
            row = {"part": "region", "name": label, "index": index, "kind": "scene"}
            if (arguments.only and name not in (BACKBONE, *arguments.only)) or not rows.lacks(row):
                continue
            transfer = MotionTransfer(backbone, **MAIN[name])
            mask = region.mask if label != name else None
            video = transfer(region.case.video, prompt, seed=index, region=mask).video
            rows.add({**row, **region_fidelity(region, video)})


def run_steady(arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int]) -> None:
    """Generations without a reference, steadied and not."""
    for index in indices:
        for name in arguments.only or STEADY:
            row = {"part": "steady", "name": name, "index": index, "kind": "scene"}
            if rows.lacks(row):
                transfer = MotionTransfer(backbone, **STEADY[name])
                rows.add({**row, **steadiness(transfer, case_of(index).prompts["scene"], index)})


def run_memory(arguments: argparse.Namespace, backbone: Backbone, rows: Rows, indices: Sequence[int]) -> None:
    """Peak of the allocator in a run of two steps, the first of them guided."""
    short = {"steps": 2, "guided_share": 0.5, "optimisation_steps": 2}
    for index in indices:
        case = case_of(index)
        for name in arguments.only or MAIN:
            row = {"part": "memory", "name": name, "index": index, "kind": "scene"}
            if rows.lacks(row):
                transfer = MotionTransfer(backbone, **{**MAIN[name], **short})

                def work(transfer: MotionTransfer = transfer, case: Case = case) -> list[torch.Tensor]:
                    transfer(case.video, case.prompts["scene"], seed=0)
                    return []

                rows.add({**row, "peak_megabytes": peak_extra_bytes(work, CPU) / 2**20})


def inside(flow: torch.Tensor, moved: np.ndarray, stride: int) -> np.ndarray:
    """Displacements of the tokens whose true place is still in the frame; all of them if there is none."""
    height, width = flow.shape[:2]
    y, x = np.meshgrid(np.arange(height) + moved[1] / stride, np.arange(width) + moved[0] / stride, indexing="ij")
    kept = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    vectors = flow.numpy()
    return vectors[kept] if kept.any() else vectors.reshape(-1, 2)


def mean_of(values: Sequence[float]) -> dict[str, float]:
    mean, low, high = interval(values)
    return {"mean": mean, "low": low, "high": high, "count": len(values)}


def paired(found: Measured, base: Measured, label: str) -> Record:
    """Differences over the references of which both have a measure."""
    differences: Record = {}
    for name in ("fidelity", "adherence", "inside", "outside", "residual", "survival", "motion"):
        common = [at for at in sorted(set(found) & set(base)) if name in found[at] and name in base[at]]
        if common:
            differences[f"{name}_above_{label}"] = mean_of([found[at][name] - base[at][name] for at in common])
    return differences


def table_of(rows: Sequence[Record]) -> Record:
    """Means with intervals by name, and paired differences: to the backbone, to the ablations' default, and of a
    zero-shot run to one that optimises for its prompt."""
    by_name: dict[str, Measured] = defaultdict(dict)
    for row in rows:
        by_name[row["name"]][row["index"], row["kind"]] = row
    table = {}
    for name, found in by_name.items():
        # A row may lack what others have: without a finite value in all of them there is no mean.
        columns: Record = {key: [row.get(key) for row in found.values()] for key in next(iter(found.values()))}
        entry = {
            key: mean_of(values)
            for key, values in columns.items()
            if all(isinstance(value, float) and np.isfinite(value) for value in values)
        }
        others = {BACKBONE: "backbone", DEFAULT: "default", name.removesuffix(ZERO_SHOT): "optimised"}
        for other, label in others.items():
            if other != name and other in by_name:
                entry |= paired(found, by_name[other], label)
        table[name] = entry
    return table


def report(rows: Rows, path: pathlib.Path, backbone: Backbone) -> None:
    parts = sorted({row["part"] for row in rows.all})
    tables = {part: table_of([row for row in rows.all if row["part"] == part]) for part in parts}
    known = {
        "model": backbone.name,
        "weights": rows.made_with["weights"],
        "commits_of_rows": sorted({row["commit"] for row in rows.all}),
        "settings": MotionTransfer(backbone).settings.described(),
        "first_seed": FIRST_SEED,
    }
    write_json(path, {**facts(), **known, "tables": tables})
    for part, table in tables.items():
        print(part)
        for name, entry in table.items():
            shown = [
                f"{key} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" for key, value in entry.items()
            ]
            count = next(iter(entry.values()))["count"]
            print(f"  {name} ({count}): " + ", ".join(shown))


LOOPS = {
    "zero-shot": run_zero_shot,
    "appendix-d": run_appendix_d,
    "region": run_region,
    "steady": run_steady,
    "memory": run_memory,
}


def main() -> None:
    arguments = parsed_arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    backbone = load_backbone(arguments.model)
    rows = Rows(arguments.rows, weights_digest(backbone.transformer))
    if arguments.report:
        report(rows, arguments.summary, backbone)
        return
    shard, shards = share_of(arguments.shard)
    for part in arguments.part:
        run = LOOPS.get(part) or functools.partial(run_configurations, part=part)
        run(arguments, backbone, rows, range(shard, arguments.references or REFERENCES[part], shards))


if __name__ == "__main__":
    main()
