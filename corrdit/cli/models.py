"""List what --model accepts by name, with the settings read from each (layers count from 0), and every family of
transformers with what it can be used for, or why not.

reads   nothing but the package; nothing is downloaded
writes  a table to standard output, or with --json one JSON object a line
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from corrdit.cli.terminal import print_table

if TYPE_CHECKING:
    from corrdit.integrations.diffusers import Preset
    from corrdit.integrations.diffusers.backbones.coverage import FamilyRow

HELP = "list the backbones with their layers and presets, and the families that are supported"
EXAMPLES = ("corrdit models", "corrdit models --json")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")


def run(arguments: Namespace) -> int:
    from corrdit.integrations.diffusers import available_backbones
    from corrdit.integrations.diffusers.backbones.coverage import USES, coverage

    backbones, families = available_backbones(), coverage()
    if arguments.json:
        for backbone in backbones:
            preset = backbone["preset"]
            print(json.dumps({**backbone, "preset": None if preset is None else preset.described()}))
        for row in (*families, *_checkpoints(families)):
            print(json.dumps(row))
        return 0
    rows = []
    for backbone in backbones:
        sizes = (backbone["family"], backbone["layers"], backbone["heads"])
        known = ["?" if value is None else str(value) for value in sizes]
        rows.append((backbone["name"], *known, _preset_text(backbone["preset"]), backbone["source"]))
    print_table(("name", "family", "layers", "heads", "preset", "weights"), rows)
    reasons = list(dict.fromkeys(use["reason"] for family in families for use in family["uses"].values()))
    reasons = [reason for reason in reasons if reason]
    print_table(("family", "transformer", *USES), [_family_cells(family, reasons) for family in families])
    for number, reason in enumerate(reasons, 1):
        print(f"[{number}] {reason}")
    published = [
        (str(row["hub_id"]), str(row["name"]), str(row["family"]), str(row["pipeline"]), str(row["size"]))
        for row in _checkpoints(families)
    ]
    print_table(("published checkpoint", "for plan", "family", "pipeline", "frames x height x width"), published)
    print(
        "--model takes the names of the first table, these checkpoints and others of the families by their hub ids, "
        "and folders of save_pretrained. The tests run every family with small random weights of the same classes."
    )
    return 0


def _checkpoints(families: list[FamilyRow]) -> list[dict[str, object]]:
    """Published checkpoints whose configuration is known, each with what its family can be used for."""
    from corrdit.integrations.diffusers.backbones.checkpoints import CHECKPOINTS

    rows: list[dict[str, object]] = []
    for name, checkpoint in CHECKPOINTS.items():
        family = next(row for row in families if checkpoint.pipeline in row["pipelines"])
        rows.append(
            {
                "hub_id": checkpoint.hub_id,
                "name": name,
                "family": family["family"],
                "pipeline": checkpoint.pipeline,
                "dtype": checkpoint.dtype,
                "size": " x ".join(map(str, checkpoint.size)),
                "uses": family["uses"],
            }
        )
    return rows


def _preset_text(preset: Preset | None) -> str:
    if preset is None:
        return "known once loaded"
    read = preset.reading
    step = read.step + read.inference_steps if read.step < 0 else read.step
    size = "the video's own size"
    if read.height:
        size = f"{read.height} x {read.width}"
    elif read.tokens_per_frame:
        size = f"at most {read.tokens_per_frame} tokens a frame"
    return f"layer {read.layer}, step {step} of {read.inference_steps}, {read.frames_per_chunk} frames a chunk, {size}"


def _family_cells(family: FamilyRow, reasons: list[str]) -> tuple[str, ...]:
    newer = " (needs a newer diffusers)" if set(family["transformers"]) & set(family["missing"]) else ""
    uses = (
        use["supported"] + (f" [{reasons.index(use['reason']) + 1}]" if use["reason"] else "")
        for use in family["uses"].values()
    )
    return (family["family"] or "-", ", ".join(family["transformers"]) + newer, *uses)
