"""List what --model accepts by name, with the settings read from each (layers count from 0), and every family of
transformers with what it can be used for, or why not.

reads   nothing but the package; nothing is downloaded
writes  a table to standard output, or with --json one JSON object a line
"""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from corrdit.cli.terminal import print_table

if TYPE_CHECKING:
    from corrdit.integrations.diffusers import Preset
    from corrdit.integrations.diffusers.backbones.coverage import FamilyRow

HELP = "list the backbones with their layers and presets, and the families that are supported"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")


def run(arguments: Namespace) -> int:
    from corrdit.integrations.diffusers import available_backbones
    from corrdit.integrations.diffusers.backbones.coverage import USES, coverage
    from corrdit.integrations.diffusers.backbones.published_checkpoints import CHECKPOINTS, UNKNOWN_CHECKPOINTS

    backbones, families = available_backbones(), coverage()
    if arguments.json:
        for backbone in backbones:
            preset = backbone["preset"]
            print(json.dumps({**backbone, "preset": None if preset is None else preset.described()}))
        for family in families:
            print(json.dumps(family))
        for name, point in CHECKPOINTS.items():
            print(json.dumps({"checkpoint": name, **dataclasses.asdict(point)}))
        for hub_id, missing in UNKNOWN_CHECKPOINTS.items():
            print(json.dumps({"hub_id": hub_id, "unknown": missing}))
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
    shown = [
        (name, point.hub_id, point.pipeline, _size_text(point.size), ", ".join(point.unknown))
        for name, point in CHECKPOINTS.items()
    ]
    print_table(("checkpoint", "hub id", "pipeline", "made for", "unknown"), shown)
    for hub_id, missing in UNKNOWN_CHECKPOINTS.items():
        print(f"{hub_id}: no public file states its {missing}; `corrdit plan FOLDER` reads its own")
    print("`corrdit plan` takes these checkpoints by either name, without their weights.")
    print("A folder written by save_pretrained and a hub id such as THUDM/CogVideoX-2b are accepted too.")
    return 0


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


def _size_text(size: tuple[int, int, int]) -> str:
    frames, height, width = size
    return f"{frames} frames, {height} x {width}"


def _family_cells(family: FamilyRow, reasons: list[str]) -> tuple[str, ...]:
    newer = " (needs a newer diffusers)" if set(family["transformers"]) & set(family["missing"]) else ""
    uses = (
        use["supported"] + (f" [{reasons.index(use['reason']) + 1}]" if use["reason"] else "")
        for use in family["uses"].values()
    )
    return (family["family"] or "-", ", ".join(family["transformers"]) + newer, *uses)
