"""--model, --preset, --device and --dtype: which video transformer a command works with, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import add_device_options, add_tiling_option, checked_device, checked_dtype, usable_devices

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.integrations.diffusers.backbones.presets import Preset


def add_model_options(parser: ArgumentParser, *, preset: bool = True) -> None:
    """--model, where it runs and, if asked for, --preset."""
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    add_device_options(parser)
    add_tiling_option(parser)
    if not preset:
        return
    parser.add_argument(
        "--preset",
        default="default",
        metavar="default|published|FILE",
        help="settings of reading, tracking, guidance and motion transfer at once: the model's own, those of the"
        " released code of DiffTrack and DiTFlow, or a preset.json that `corrdit calibrate` wrote",
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


def loaded_backbone(arguments: Namespace, preset: Preset | str | None = None) -> Backbone:
    """The backbone of these options.

    Args:
        arguments: with model, device and dtype.
        preset: of `checked_preset`.

    Raises:
        ValueError: an unknown model, one that cannot be loaded, a preset of another model, or a device that is not
            there.
    """
    import torch

    from corrdit.integrations.diffusers.backbones import loading
    from corrdit.integrations.diffusers.placement import placed_backbone, tile

    device, dtype = checked_device(arguments.device), checked_dtype(arguments.dtype)
    if arguments.placement != "device":
        first = torch.device(usable_devices()[:2][-1])  # a GPU where there is one
        return placed_backbone(
            arguments.model,
            device=device or first,
            dtype=dtype,
            placement=arguments.placement,
            tiled=arguments.tiled,
            preset=preset,
        )
    backbone = loading.load_backbone(arguments.model, device=device, dtype=dtype, preset=preset)
    if arguments.tiled:
        tile(backbone.pipe)
    return backbone
