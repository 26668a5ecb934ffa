"""Does motion transfer work? Measured on the embedded model, where the reference's motion is known exactly.

    python benchmarks/transfer_quality.py --part main --references 64
    python benchmarks/transfer_quality.py --report

Parts: main (every method), zero-shot, ablations, appendix-d. Each row is appended to a file as soon as it is there, so
a run may be stopped and goes on; `--shard 0/4` takes every fourth reference. `--report` sums all rows up, with paired
bootstrap intervals over references.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transfer_world import FIRST_SEED, TUNING_SEED, Case, adherence, case_of, interval, measures, moved_frame

from corrdit import MotionTransfer, load_backbone, motion

RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("caption", "subject", "scene")
BACKBONE, DEFAULT, ZERO_SHOT = "backbone", "block 4", ", zero-shot"
BASE: dict[str, Any] = {"steps": 20, "guidance_scale": 1.0, "learning_rate": 0.05}
# Learning rates are the best of four for each method on other references (`--part tuning`).
MAIN: dict[str, dict[str, Any]] = {
    "backbone": {"method": "backbone"},
    "injection": {"method": "injection", "injection_blocks": (0,)},
    "smm": {"method": "smm", "loss": "paper"},
    "smm released": {"method": "smm", "loss": "released", "learning_rate": 0.02},
    "moft": {"method": "moft", "learning_rate": 0.2},
    "motionclone": {"method": "motionclone"},
    "ditflow latents": {"method": "ditflow"},
    "ditflow embeddings": {"method": "ditflow", "optimise": "embedding", "learning_rate": 0.02},
}
ABLATIONS: dict[str, dict[str, Any]] = {
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
    **{f"learning rate {rate}": {"learning_rate": rate} for rate in (0.02, 0.1, 0.2)},
}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["main", "zero-shot", "ablations", "appendix-d", "tuning"], default="main")
    parser.add_argument("--report", action="store_true", help="sum up the rows instead of measuring")
    parser.add_argument("--references", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, "empty"], default=None, help="kinds of prompt, in turn")
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", default=str(RESULTS / "transfer_quality_rows.jsonl"))
    parser.add_argument("--summary", default=str(RESULTS / "transfer_quality.json"))
    parser.add_argument("--only", nargs="+", default=None, help="names of some configurations")
    return parser.parse_args()


class Rows:
    """Finished rows in a file of JSON lines, one added at a time."""

    def __init__(self, path: str) -> None:
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.all = [json.loads(line) for line in lines if line.endswith("}")]
        self.done = {self.key(row) for row in self.all}

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["part"], row["name"], row["index"], row["kind"])

    def add(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.all.append(row)
        self.done.add(self.key(row))


def measured(backbone: Any, case: Case, prompt: str, settings: dict[str, Any], index: int) -> dict[str, Any]:
    began = time.process_time()
    result = MotionTransfer(backbone, **{**BASE, **settings})(case.video, prompt, seed=index)
    row = {"seconds": time.process_time() - began, **measures(case, result.video)}
    # Steps that use a gradient again have no loss of their own.
    losses = result.losses[np.isfinite(result.losses)]
    if losses.size:
        row |= {"first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    return row


def run_configurations(arguments: argparse.Namespace, backbone: Any, rows: Rows, indices: list[int]) -> None:
    configurations = MAIN if arguments.part == "main" else ABLATIONS
    names = arguments.only or list(configurations)
    for index in indices:
        case = case_of(index)
        for kind in kinds_of(arguments, index):
            for name in names:
                row = {"part": arguments.part, "name": name, "index": index, "kind": kind}
                if Rows.key(row) not in rows.done:
                    rows.add({**row, **measured(backbone, case, case.prompts[kind], configurations[name], index)})


def run_tuning(arguments: argparse.Namespace, backbone: Any, rows: Rows, indices: list[int]) -> None:
    """Learning rate of each method and block of DiTFlow, on references that are not used again."""
    configurations = {
        f"{name} at {rate}": {**settings, "learning_rate": rate}
        for name, settings in MAIN.items()
        if name not in ("backbone", "injection")
        for rate in (0.02, 0.05, 0.1, 0.2)
    }
    configurations |= {f"ditflow block {block}": {"blocks": (block,)} for block in (2, 3, 5)}
    configurations["backbone"] = MAIN["backbone"]
    for index in indices:
        case = case_of(index, TUNING_SEED)
        for name in arguments.only or configurations:
            row = {"part": "tuning", "name": name, "index": index, "kind": "scene"}
            if Rows.key(row) not in rows.done:
                rows.add({**row, **measured(backbone, case, case.prompts["scene"], configurations[name], index)})


def run_zero_shot(arguments: argparse.Namespace, backbone: Any, rows: Rows, indices: list[int]) -> None:
    """Optimise with the caption, inject into another scene, beside optimising for that scene."""
    methods = {name: MAIN[name] for name in ("ditflow latents", "ditflow embeddings", "smm")}
    for index in indices:
        case = case_of(index)
        prompt = case.prompts["scene"]
        others = [case_of(index + 1 + other).prompts["scene"] for other in range(7)]
        for name, settings in {"backbone": MAIN["backbone"], **methods}.items():
            transfer = MotionTransfer(backbone, **{**BASE, **settings})
            row = {"part": "zero-shot", "index": index, "kind": "scene"}
            if Rows.key({**row, "name": name}) not in rows.done:
                video = transfer(case.video, prompt, seed=index).video
                quality = {"adherence": adherence(backbone, video, prompt, others)}
                rows.add({**row, "name": name, **measures(case, video), **quality})
            if name != "backbone" and Rows.key({**row, "name": f"{name}{ZERO_SHOT}"}) not in rows.done:
                stored = transfer(case.video, case.prompts["caption"], seed=index).optimised
                video = transfer(None, prompt, stored=stored, seed=index).video
                quality = {"adherence": adherence(backbone, video, prompt, others)}
                rows.add({**row, "name": f"{name}{ZERO_SHOT}", **measures(case, video), **quality})


def run_appendix_d(arguments: argparse.Namespace, backbone: Any, rows: Rows, indices: list[int]) -> None:
    """Agreement of the attention motion flow of a moved picture with the known motion, by block."""
    layers = tuple(range(backbone.layers))
    transfer = MotionTransfer(backbone, block=layers, steps=1)
    for index in indices:
        row = {"part": "appendix-d", "index": index, "kind": ""}
        if Rows.key({**row, "name": "latents"}) in rows.done:
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


def inside(flow: torch.Tensor, moved: np.ndarray, stride: int) -> np.ndarray:
    """Displacements of the tokens whose true place is still in the frame; all of them if there is none."""
    height, width = flow.shape[:2]
    y, x = np.meshgrid(np.arange(height) + moved[1] / stride, np.arange(width) + moved[0] / stride, indexing="ij")
    kept = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    vectors = flow.numpy()
    return vectors[kept] if kept.any() else vectors.reshape(-1, 2)


def kinds_of(arguments: argparse.Namespace, index: int) -> Iterator[str]:
    """Every kind of prompt asked for; without any, the kinds take turns over the references."""
    yield from arguments.kinds or [KINDS[index % len(KINDS)]]


def is_finite_number(value: Any) -> bool:
    return isinstance(value, float) and bool(np.isfinite(value))


def paired(found: dict[Any, dict[str, Any]], base: dict[Any, dict[str, Any]], label: str) -> dict[str, Any]:
    """Differences over the references that both have."""
    common = sorted(set(found) & set(base))
    measured_names = [name for name in ("fidelity", "adherence") if common and name in found[common[0]]]
    return {
        f"{name}_above_{label}": interval([found[at][name] - base[at][name] for at in common])
        for name in measured_names
    }


def report(rows: Rows, path: str, model: str) -> None:
    """Means with intervals, and paired differences: to the backbone, to the ablations' default, and of a zero-shot run
    to one that optimises for its prompt."""
    tables: dict[str, Any] = {}
    for part in sorted({row["part"] for row in rows.all}):
        by_name: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for row in rows.all:
            if row["part"] == part:
                by_name[row["name"]][row["index"], row["kind"]] = row
        table = {}
        for name, found in by_name.items():
            # A row may lack what others have: without a finite value in all of them there is no mean.
            every = found.values()
            measured_names = [key for key in next(iter(every)) if all(is_finite_number(row.get(key)) for row in every)]
            entry = {key: interval([row[key] for row in found.values()]) for key in measured_names}
            for other, label in (
                (BACKBONE, "backbone"),
                (DEFAULT, "default"),
                (name.removesuffix(ZERO_SHOT), "optimised"),
            ):
                if other != name and other in by_name:
                    entry |= paired(found, by_name[other], label)
            table[name] = entry
        tables[part] = table
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent,
    )
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": model,
        "settings": BASE,
        "first_seed": FIRST_SEED,
    }
    pathlib.Path(path).write_text(json.dumps({**facts, "tables": tables}, indent=1) + "\n", encoding="utf-8")
    for part, table in tables.items():
        print(part)
        for name, entry in table.items():
            shown = [
                f"{key} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]" for key, value in entry.items()
            ]
            count = next(iter(entry.values()))["count"]
            print(f"  {name} ({count}): " + ", ".join(shown))


def main() -> None:
    arguments = parsed_arguments()
    rows = Rows(arguments.rows)
    if not arguments.report:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        shard, shards = (int(part) for part in arguments.shard.split("/"))
        indices = [index for index in range(arguments.references) if index % shards == shard]
        backbone = load_backbone(arguments.model)
        parts = {"zero-shot": run_zero_shot, "appendix-d": run_appendix_d, "tuning": run_tuning}
        parts.get(arguments.part, run_configurations)(arguments, backbone, rows, indices)
    report(rows, arguments.summary, arguments.model)


if __name__ == "__main__":
    main()
