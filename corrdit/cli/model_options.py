"""--model, --preset and where and how it is loaded: which video transformer a command works with."""

from __future__ import annotations

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
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    add_device_options(parser)
    if not preset:
        return
    parser.add_argument(
        "--preset",
        default="default",
        metavar="default|published|ditracker|heft|FILE",
        help="settings of reading, tracking, guidance and motion transfer at once: the model's own, those of the"
        " released code of DiffTrack and DiTFlow, what the trackers DiTracker and HeFT read of their models, or a"
        " preset.json that `corrdit calibrate` wrote",
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
