"""Train the embedded video diffusion transformer on generated videos.

reads   --recipe: a recipe of the package or a YAML file; the videos are generated while it trains
writes  into the folder --output: checkpoints/, logs/part_N/metrics.csv of each piece of a run, and pipeline/, which
        `corrdit track --model` takes
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from corrdit.cli.devices import named
from corrdit.cli.lightning_runs import quiet_lightning

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "train the embedded model on generated videos"
EXAMPLES = (
    "corrdit train --output trained --recipe smoke",
    "corrdit train --output trained --resume --minutes 60",
    "corrdit track my_video.mp4 --output tracks --model trained/pipeline",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, help="folder for checkpoints, logs and the exported pipeline")
    parser.add_argument(
        "--recipe",
        default="cpu",
        help="a recipe shipped with the package (cpu, gpu, smoke, varied) or a YAML file with the same entries",
    )
    parser.add_argument("--steps", type=int, default=None, help="number of steps in place of the recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the output folder")
    parser.add_argument(
        "--start",
        default=None,
        metavar="embedded|DIR",
        help="begin with the weights of the shipped model or of the pipeline in a folder",
    )
    parser.add_argument(
        "--photographs",
        default=None,
        metavar="DIR",
        help="folder of pictures, for recipes that show them (benchmarks/photographs.py fetches some)",
    )
    parser.add_argument("--export-only", action="store_true", help="only export the newest checkpoint as a pipeline")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads of a process; PyTorch's default otherwise"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="stop after this long, with a checkpoint; --resume goes on, for as long again",
    )
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes that share each batch")


def run(arguments: Namespace) -> int:
    """Train, or resume, and export float16 weights with a model card."""
    from corrdit.integrations.embedded.training.recipe import (
        export_checkpoint,
        load_recipe,
        newest_checkpoint,
        refuse_other_folder,
        train,
    )

    config = load_recipe(arguments.recipe, steps=arguments.steps)
    output = pathlib.Path(arguments.output)
    exported = output / "pipeline"
    refuse_other_folder(exported)
    if not arguments.export_only:
        options = ("resume", "start", "photographs", "checkpoint_every", "threads", "processes", "minutes")
        with quiet_lightning():
            module = train(config, output, **named(arguments, *options))
        if not module.trainer.is_global_zero:
            return 0
    folder = export_checkpoint(newest_checkpoint(output), exported)
    print(f"exported {folder}")
    if not arguments.export_only and module.trainer.global_step < config.steps:
        print(f"stopped at step {module.trainer.global_step} of {config.steps}; --resume goes on")
        return 0 if arguments.minutes is not None else 1
    return 0
