"""Generate videos from prompts, with cross-attention guidance beside without.

reads   PROMPT, or --prompts: a text file with one prompt a line (empty lines and lines that begin with # are left out)
writes  into the folder --output, all of them or none; with --prompts into a folder 0000, 0001, ... of it for each, and
        the next run with the same settings does what is left:
        video.mp4         the video; with --cag the guided one
        sheet.png         a contact sheet of it; with --cag each frame beside that without guidance
        plain.mp4         with --cag: the same seed without guidance
        side_by_side.mp4  with --cag: both, with their names, small videos enlarged
        generation.json   prompt, seed and settings

With --vbench also vbench/: copies named PROMPT-SAMPLE.mp4, in guided/ and plain/, for VBench's own tool; the names of
long prompts are cut, and prompts.json says which video is of which prompt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrdit.cli.devices import add_run_options, named, trainer_devices
from corrdit.cli.earlier_names import add_earlier_name
from corrdit.cli.frame_options import add_num_frames_option, add_size_option
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import add_model_options, checked_preset, chosen_placement, loaded_backbone
from corrdit.files import OutputFolder, write_json

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "generate videos from prompts, with cross-attention guidance beside without"
USAGE = "PROMPT | --prompts FILE  --output DIR [--cag] [--model embedded] [options]"
EXAMPLES = (
    'corrdit generate "a red disc moves left over grass" --output made',
    'corrdit generate "a red disc moves left over grass" --cag --output guided',
    "corrdit generate --prompts prompts.txt --cag --model cogvideox-2b --device cuda --output guided --processes 8",
)
MAIN = (
    *("help", "help_all", "prompt", "prompts", "output", "model", "device", "dtype", "preset", "seed", "samples"),
    *("num_frames", "size", "steps", "guidance_scale", "cag", "cag_layers", "cag_scale"),
    *("processes",),
)
_VARIANTS = {"default": None, "masked": True, "zeroed": False}
_GUIDANCE: dict[str, dict[str, Any]] = {
    "layers": {
        "default": None,
        "metavar": "13,17,21",
        "help": "layers that lose their cross-frame attention; published or the model's matching layer if left out",
    },
    "scale": {"type": float, "default": 1.0, "help": "guidance scale"},
    "start": {"type": float, "default": 0.0, "help": "share of the steps before it begins"},
    "stop": {"type": float, "default": 1.0, "help": "share of the steps after which it ends"},
    "variant": {
        "choices": [*_VARIANTS, "published"],
        "default": "default",
        "help": "cross-frame keys masked before the softmax, or their weights zeroed after it",
    },
    "span": {"type": int, "default": 0, "metavar": "N", "help": "frames up to N away are kept"},
    "perturbation": {
        "choices": ["cross_frame", "identity", "skip"],
        "default": "cross_frame",
        "help": "identity: perturbed-attention guidance; skip: the blocks are left out",
    },
    "heads": {"default": None, "metavar": "0,3", "help": "heads to perturb in each layer; all if left out"},
    "adaptive_scale": {
        "type": float,
        "default": 0.0,
        "help": "by this the scale falls for each timestep from the noisiest, down to 0",
    },
}
"""The options --cag-NAME."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", default=None, metavar="PROMPT", help="what the video shows")
    parser.add_argument("--prompts", default=None, metavar="FILE", help="text file with one prompt a line")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise; further videos get the numbers after it")
    parser.add_argument(
        "--same-seed",
        action="store_true",
        help="with --prompts: every prompt from --seed, not from the numbers after it",
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="with --prompts: videos for each prompt")
    add_num_frames_option(parser, "frames; the model's if left out")
    add_size_option(parser, "of the frames in pixels, such as 480x720; the model's if left out")
    parser.add_argument("--steps", type=int | None, default=None, metavar="N", help="denoising steps")
    parser.add_argument("--guidance-scale", type=float | None, default=None, help="of classifier-free guidance")
    parser.add_argument("--negative-prompt", default=None, help="for classifier-free guidance")
    parser.add_argument(
        "--pipeline", type=dict | None, default=None, metavar="JSON", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second of the files")
    add_run_options(parser, on_broken="raise")
    add_earlier_name(parser, "devices", "processes", type=int | None)
    parser.add_argument("--vbench", action="store_true", help="also lay the videos out for VBench's own tool")
    group = parser.add_argument_group("cross-attention guidance")
    group.add_argument("--cag", action="store_true", help="guide, and write the video without guidance too")
    for name, option in _GUIDANCE.items():
        group.add_argument(f"--cag-{name.replace('_', '-')}", **option)


def run(arguments: Namespace) -> int:
    if (arguments.prompt is None) == (arguments.prompts is None):
        given = "both were given" if arguments.prompt is not None else "neither was given"
        raise ValueError(f"generate takes a PROMPT or --prompts FILE; {given}")
    _check_guidance_is_on(arguments)
    if arguments.prompt is not None:
        return _one(arguments)
    return _many(arguments)


def _one(arguments: Namespace) -> int:
    from corrdit.integrations.diffusers.backbones.published_models import default_layers
    from corrdit.integrations.diffusers.guidance import comparison
    from corrdit.runs import SETTINGS_FILE, refuse_other_record

    if not arguments.prompt.strip():
        raise ValueError("PROMPT is empty; say what the video shows")
    if arguments.samples != 1 or arguments.processes != 1 or arguments.vbench or arguments.same_seed:
        raise ValueError(
            "--samples, --processes, --vbench and --same-seed go with --prompts FILE; leave them out with a single "
            "PROMPT"
        )
    began = time.perf_counter()
    call, guidance, preset = _call(arguments), _guidance(arguments), checked_preset(arguments.preset)
    fps = comparison.checked_rate(arguments.fps)
    if (Path(arguments.output) / SETTINGS_FILE).exists():
        raise ValueError(
            f"{arguments.output} holds the videos of a run with --prompts; give a single PROMPT another output folder"
        )
    with OutputFolder(arguments.output) as folder:
        backbone = loaded_backbone(arguments, preset)
        if guidance is not None and guidance["layers"] is None:
            guidance["layers"] = default_layers(backbone)
        details = {"model": backbone.name, "call": call, "guidance": guidance}
        now = {**details, **named(arguments, "prompt", "seed"), "fps": fps}
        refuse_other_record(Path(arguments.output) / comparison.DETAILS_FILE, now)
        generated = comparison.generate(backbone, arguments.prompt, arguments.seed, call, guidance)
        files = [*comparison.write_generated(folder, generated, fps=fps), folder / comparison.DETAILS_FILE]
        write_json(files[-1], {**comparison.generation_facts(generated, fps), **details})
    frames, height, width, _ = generated.video.shape
    layers = "" if guidance is None else f", guided in layers {', '.join(map(str, guidance['layers']))}"
    print(f"{frames} frames of {height} x {width} in {time.perf_counter() - began:.1f} s{layers}")
    for file in files:
        print(f"  {Path(arguments.output) / file.name}")
    return 0


def _many(arguments: Namespace) -> int:
    from corrdit.integrations.diffusers.guidance.comparison import DETAILS_FILE
    from corrdit.integrations.lightning import GenerationModule, PromptDataModule

    if (Path(arguments.output) / DETAILS_FILE).exists():
        raise ValueError(f"{arguments.output} holds the video of a single PROMPT; give --prompts another output folder")
    began = time.perf_counter()
    devices = trainer_devices(arguments, unset="auto")
    data = PromptDataModule(arguments.prompts, **named(arguments, "samples", "seed", "same_seed", "output"))
    module = GenerationModule(
        arguments.model,
        model_preset=checked_preset(arguments.preset),
        call=_call(arguments),
        guidance=_guidance(arguments),
        placement=chosen_placement(arguments),
        **named(arguments, "output", "fps", "dtype", "vbench", "on_broken"),
    )
    with quiet_lightning():
        trainer = command_trainer(several=arguments.processes > 1, **devices)
        predict(trainer, module, data)
        trainer.strategy.barrier("every process has made its videos")
    if not trainer.is_global_zero:
        return 0
    left = data.left()
    for name in left:
        print(f"corrdit generate: {name}: {module.results.failure(name)}", file=sys.stderr)
    done, there = len(data.pending) - len(left), len(data.items) - len(data.pending)
    others = f"; {there} were there" if there else ""
    print(f"{done} of {len(data.items)} videos generated in {time.perf_counter() - began:.1f} s{others}")
    print(f"  {arguments.output}")
    return 2 if left else 0


def _call(arguments: Namespace) -> dict[str, object]:
    """Arguments of the pipeline's call that were given."""
    named = {
        "num_frames": arguments.num_frames,
        "height": arguments.height,
        "width": arguments.width,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "negative_prompt": arguments.negative_prompt,
    }
    return {**{name: value for name, value in named.items() if value is not None}, **(arguments.pipeline or {})}


def _check_guidance_is_on(arguments: Namespace) -> None:
    """Raises ValueError for settings of a guidance that was not asked for."""
    changed = [name for name, option in _GUIDANCE.items() if getattr(arguments, f"cag_{name}") != option["default"]]
    given = [f"--cag-{name.replace('_', '-')}" for name in changed]
    if given and not arguments.cag:
        goes = "goes" if len(given) == 1 else "go"
        raise ValueError(f"{', '.join(given)} {goes} with --cag, without which nothing is guided; add --cag")


def _guidance(arguments: Namespace) -> dict[str, Any] | None:
    if not arguments.cag:
        return None
    published = arguments.cag_variant == "published"
    return {
        "layers": None if arguments.cag_layers is None else _numbers("layers", arguments.cag_layers),
        "renormalize": None if published else _VARIANTS[arguments.cag_variant],
        "preset": "published" if published else None,
        "heads": None if arguments.cag_heads is None else _numbers("heads", arguments.cag_heads),
        **{name: arguments[f"cag_{name}"] for name in ("scale", "start", "stop", "span")},
        **{name: arguments[f"cag_{name}"] for name in ("perturbation", "adaptive_scale")},
    }


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"--cag-{name} {text} is not a list of {name}; accepted are numbers with commas, such as 13,17,21"
        ) from None
