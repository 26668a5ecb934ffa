"""What a task takes of a card, before anything is loaded: tokens, memory by part, work, and on which cards it fits.

reads   MODEL: embedded, a folder with model_index.json and a config.json for each component, or a published checkpoint
        by its short name or hub id. Weights are neither read nor downloaded
writes  a table to standard output, or with --json one JSON object
The transformer, the codec and the text encoders run the task's own code on tensors without contents; each storage is
followed from its making to its end. Not counted are CUDA's context, libraries' workspaces and fragments: a card of N GB
is taken to have N x 10^9 bytes for the task, about 7 % less than it has. Times are lower bounds: the work at the rate
of the card's data sheet. Where nothing was measured on a card, no other time is given.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from corrdit.cli.devices import add_fitting_options, add_options, dtype_name, given_options, named
from corrdit.cli.model_options import chosen_placement
from corrdit.cli.terminal import print_table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.cli.devices import OptionTable
    from corrdit.integrations.diffusers.planning.plan import Plan

HELP = "memory and work of a task before anything is loaded"
USAGE = "MODEL [--task transfer] [--frames N --height N --width N] [options]"
_TASKS = ("track", "capture", "generate", "transfer")
_SETTINGS: OptionTable = {
    "method": (str, "of the transfer: ditflow, smm, ..."),
    "optimise": (str, "of the transfer: latent or embedding"),
    "blocks": (list[int] | int, "of the transfer: attention layers that are compared, such as [20]"),
    "guided_share": (float, "of the transfer: share of the steps that are guided"),
    "optimisation_steps": (int, "of the transfer: steps of the optimiser at each guided step"),
    "gradient_checkpointing": (bool, "of the transfer: less memory, more time"),
}
_GIB = 2**30


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="embedded, a folder of configurations, or a published checkpoint"
    )
    parser.add_argument("--task", choices=_TASKS, default="transfer", help="what is planned")
    parser.add_argument("--cag", action="store_true", help="with --task generate: cross-attention guidance")
    parser.add_argument("--frames", type=int | None, default=None, metavar="N", help="frames; the model's if left out")
    parser.add_argument("--height", type=int | None, default=None, help="pixels; the model's if left out")
    parser.add_argument("--width", type=int | None, default=None, help="pixels; the model's if left out")
    parser.add_argument("--steps", type=int | None, default=None, metavar="N", help="denoising steps")
    parser.add_argument("--layers", type=list[int] | None, default=None, help="that are captured or guided, as [17]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="that is planned for")
    parser.add_argument("--dtype", type=dtype_name, default=None, help="of the weights; the model's if left out")
    add_fitting_options(parser)
    add_options(parser, _SETTINGS, "; the model's preset if left out")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: Namespace) -> int:
    import torch

    from corrdit.integrations.diffusers.planning.plan import plan

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    layers = None if arguments.layers is None else tuple(arguments.layers)
    if not arguments.json:
        print(f"corrdit plan: tracing {arguments.task} on {arguments.model}", file=sys.stderr, flush=True)
    found = plan(
        arguments.model,
        arguments.task,
        dtype=dtype,
        layers=layers,
        placement=chosen_placement(arguments),
        settings=given_options(arguments, _SETTINGS),
        **named(arguments, "frames", "height", "width", "steps", "device", "cag"),
    )
    if arguments.json:
        print(json.dumps(found.described()))
        return 0
    _show(found)
    return 0


def _show(found: Plan) -> None:
    size = f"{found.frames} frames of {found.height} x {found.width}"
    print(
        f"{found.task} with {found.model} in {found.dtype}, {size}: {found.tokens:,} + {found.text_tokens} text tokens"
    )
    parameters = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in found.parameters.items())
    print(f"parameters in billions: {parameters}")
    unknown = [name for name, source in found.sources.items() if source.startswith("unknown")]
    if unknown:
        print(f"not known, and in no figure: {', '.join(unknown)}")
    print(f"as asked for ({found.way}):")
    rows = []
    for phase in found.phases:
        weights = sum(phase.weights.values()) + phase.parts.get("weights", 0)
        parts = [phase.parts.get(kind, 0) for kind in ("saved for backward", "activations", "operation", "codec")]
        sizes = [f"{size / _GIB:.2f}" for size in (weights, *parts, phase.peak)]
        rows.append((phase.name, f"{phase.times:g}", *sizes, f"{phase.flop / 1e12:,.0f}"))
    print_table(("phase", "times", "weights", "saved", "activations", "operation", "codec", "GiB", "TFLOP"), rows)
    print(f"most: {found.peak / _GIB:.1f} GiB, {found.largest.name}")
    if found.fits:
        shown = [
            (card, "no way of these" if way is None else str(way[0]), "" if way is None else f"{way[1] / _GIB:.1f}")
            for card, way in found.fits.items()
        ]
        print_table(("card", "fits with", "GiB"), shown)
    bounds = ", ".join(f"{seconds / 60:.1f} min ({name})" for name, seconds in found.bounds().items())
    print(f"work {found.flop / 1e15:.1f} PFLOP; lower bound in time at the data sheet's rate: {bounds}")
    print("no time was measured on these cards with this version, so none is given")
