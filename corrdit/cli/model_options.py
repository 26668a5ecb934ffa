"""--model, --preset and where and how it is loaded: which video transformer a command works with."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import add_device_options, checked_device, usable_devices

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.integrations.diffusers.backbones.presets import Preset
    from corrdit.integrations.diffusers.placement import Placement


def add_model_options(parser: ArgumentParser, *, preset: bool = True) -> None:
    """--model, where it runs and, if asked for, --preset."""
    parser.add_argument(
        "--model",
        default="embedded",
        metavar="NAME|DIR",
        help="embedded, another name of `corrdit models`, a folder of save_pretrained, or a hub id",
    )
    add_device_options(parser)
    if not preset:
        return
    parser.add_argument(
        "--preset",
        default="default",
        metavar="default|published|ditracker|heft|FILE",
        help="settings: the model's own, those of the released code of DiffTrack and DiTFlow, of DiTracker or HeFT, or"
        " a preset.json of `corrdit calibrate`",
    )


def checked_preset(given: str) -> Preset | str | None:
    """What `corrdit.load_backbone` takes as preset.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither a preset's name nor a file that holds one.
    """
    from corrdit.integrations.diffusers.backbones.presets import PRESET_NAMES, checked_preset

    if given not in PRESET_NAMES and not Path(given).exists() and not Path(given).suffix:
        raise ValueError(f"--preset {given} is not understood; accepted are {', '.join(PRESET_NAMES)} or a preset.json")
    return checked_preset(given)


def loaded_backbone(
    arguments: Namespace, preset: Preset | str | None = None, default: Placement | None = None
) -> Backbone:
    """The backbone of these options.

    Args:
        arguments: with model, device and dtype.
        preset: of `checked_preset`.
        default: placement, over which that of the arguments goes.

    Raises:
        ValueError: an unknown model, one that cannot be loaded, a preset of another model, or a device that is not
            there.
    """
    from corrdit.integrations.diffusers.placement import placed_backbone

    placement, device = chosen_placement(arguments, default), checked_device(arguments.device)
    if placement.parts != "device":
        device = device or offloading_device()
    return placed_backbone(arguments.model, device=device, dtype=arguments.dtype, placement=placement, preset=preset)


def note_on_real_videos(model: str, command: str) -> None:
    """Says on the error stream what to expect of the shipped model on a real video, and which one to take."""
    if model == "embedded":
        print(
            f"corrdit {command}: note: the embedded model has seen generated videos only; on a real one expect it to"
            " lose many points after the first frames. With a GPU take --model cogvideox-2b --device cuda --preset"
            " published (corrdit plan cogvideox-2b --task track says what it needs)",
            file=sys.stderr,
        )


def offloading_device() -> torch.device:
    """Where parts are brought that are offloaded: a GPU where there is one."""
    import torch

    return torch.device(usable_devices()[:2][-1])


def chosen_placement(arguments: Namespace, default: Placement | None = None) -> Placement:
    """What --placement, --codec-tiling, --codec-slicing and --weights say, over a default.

    Raises:
        ValueError: options that do not go together.
    """
    from corrdit.integrations.diffusers.placement import Placement

    names = {
        "placement": "parts",
        "codec_tiling": "codec_tiling",
        "codec_slicing": "codec_slicing",
        "weights": "weights",
    }
    given = {field: arguments[name] for name, field in names.items() if arguments[name] is not None}
    return replace(default or Placement(), **given)
