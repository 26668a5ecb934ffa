"""`corrdit transfer TABLE`: motion transfer for all pairs of a table, by one method or by those of DiTFlow's tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrdit.cli.devices import checked_device, named, trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import checked_preset, chosen_placement
from corrdit.cli.terminal import print_table
from corrdit.files import markdown_table, write_csv, write_json, written_beside

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from corrdit.integrations.diffusers.motion_transfer.published import Variant

TABLE_SUFFIXES = (".csv", ".js", ".json")
MEASURES = ("motion_fidelity", "motion_fidelity_released", "image_quality")
COLUMNS = (
    "method",
    "prompts",
    "pairs",
    "left out",
    "motion fidelity",
    "as released",
    "image quality",
    "published fidelity",
    "published quality",
)
_ALONE = {"stored": None, "elsewhere": None, "prompt": None, "max_frames": None, "format": "mp4"}
"""Options that go with one reference, and what they are where nobody gave them."""
_IN_COLUMNS = {"start": 0, "seed": 0, "region": None}
"""Likewise, for which a table has columns."""


def transfer_table(arguments: Namespace, settings: dict[str, Any]) -> int:
    """Transfer every pair of a table, and write a table of the measures.

    Args:
        arguments: of `corrdit transfer`.
        settings: of the transfer that were given.

    Returns:
        0, or 2 where a pair could not be transferred; those are named on the error stream.
    """
    from corrdit.data.motion_pairs import read_pairs
    from corrdit.integrations.diffusers.motion_transfer.published import COMPARISONS, Variant
    from corrdit.integrations.diffusers.motion_transfer.results_on_disk import chosen_tracker

    began = time.perf_counter()
    for name, unset in {**_ALONE, **_IN_COLUMNS}.items():
        if arguments[name] != unset:
            shown = "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"
            hint = f"give the table a column {name}" if name in _IN_COLUMNS else "leave it out"
            raise ValueError(f"{shown} goes with one reference, and {arguments.reference} is a table; {hint}")
    tracker = chosen_tracker(arguments.tracker)
    pairs = read_pairs(arguments.reference, arguments.videos, stride=arguments.stride)
    variants: Sequence[Variant] = (Variant(""),)
    if arguments.compare is not None:
        variants = COMPARISONS[arguments.compare]
        twice = sorted({name for variant in variants for name in variant.changes} & settings.keys())
        if twice:
            raise ValueError(
                f"--{twice[0].replace('_', '-')} is what --compare {arguments.compare} varies; leave it out"
            )
    rows, failed = [], 0
    for variant in variants:
        output = Path(arguments.output) / variant.name if variant.name else Path(arguments.output)
        made = _transferred(arguments, pairs, output, {**settings, **variant.changes}, tracker)
        if made is None:
            continue
        layers, records = made
        failed += len(pairs) - len(records)
        rows += _rows(variant, layers, pairs, records)
    if not rows:
        return 0
    _write(Path(arguments.output), rows, tracker, arguments.clip)
    print_table(COLUMNS, [[_shown(value) for value in row] for row in rows])
    print(f"motion fidelity by tracks of {tracker}; {len(pairs)} pairs in {time.perf_counter() - began:.1f} s")
    print(f"  {Path(arguments.output) / 'table.csv'}, table.md, table.json")
    return 2 if failed else 0


def _transferred(
    arguments: Namespace, pairs: Sequence[Any], output: Path, settings: dict[str, Any], tracker: str
) -> tuple[int, dict[str, dict[str, Any]]] | None:
    """Layers of the model, and what is known of each pair's result; None in all processes but the first."""
    from corrdit.files import read_json
    from corrdit.integrations.diffusers.motion_transfer.results_on_disk import METRICS_FILE
    from corrdit.integrations.diffusers.placement import released_placement

    devices = trainer_devices(arguments)
    with quiet_lightning():
        from corrdit.integrations.lightning import TransferDataModule, TransferModule

        call = {name: value for name, value in named(arguments, "num_frames", "height", "width").items() if value}
        released = released_placement(arguments.model, checked_device(arguments.device))
        module = TransferModule(
            arguments.model,
            output=output,
            model_preset=checked_preset(arguments.preset),
            settings=settings,
            call=call,
            tracker=tracker,
            measure=arguments.metrics,
            placement=chosen_placement(arguments, released),
            **named(arguments, "fps", "dtype", "clip", "on_broken"),
        )
        trainer = command_trainer(several=arguments.processes > 1, **devices)
        data = TransferDataModule(pairs, output=output)
        predict(trainer, module, data)
        trainer.strategy.barrier("every process has done its pairs")
    if not trainer.is_global_zero:
        return None
    records = {}
    for pair in pairs:
        failure = module.results.failure(pair["name"]) if pair["name"] in data.left() else None
        if failure is not None:
            print(f"corrdit transfer: {output.name}/{pair['name']}: {failure}", file=sys.stderr)
        else:
            records[pair["name"]] = read_json(output / pair["name"] / METRICS_FILE)
    return module.layers, records


def _rows(variant: Variant, layers: int, pairs: Sequence[Any], records: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """A row for each kind of prompt, and one for all."""
    kinds = list(dict.fromkeys(pair["kind"] for pair in pairs))
    published = variant.published.get(layers, (None, None))
    rows = []
    for kind in [*(kinds if len(kinds) > 1 else []), None]:
        chosen = [pair["name"] for pair in pairs if kind is None or pair["kind"] == kind]
        found = [records[name] for name in chosen if name in records]
        means = [_mean([record[measure] for record in found if measure in record]) for measure in MEASURES]
        beside = published if kind is None else (None, None)
        name = variant.name or (found[0]["settings"]["method"] if found else "")
        rows.append([name, kind or "all", len(found), len(chosen) - len(found), *means, *beside])
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _write(output: Path, rows: list[list[Any]], tracker: str, clip: str | None) -> None:
    facts = {"tracker": tracker, "clip": clip, "columns": COLUMNS, "rows": rows}
    write_csv(output / "table.csv", [dict(zip(COLUMNS, row, strict=True)) for row in rows])
    shown = [[_shown(value) for value in row] for row in rows]
    with written_beside(output / "table.md", "w") as file:
        file.write(markdown_table(COLUMNS, shown))
        file.write(f"\nMotion fidelity by tracks of {tracker}; image quality by {clip or 'no CLIP'}, raw cosine.\n")
    write_json(output / "table.json", facts)
