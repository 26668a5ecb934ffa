"""--model, --preset, --device and --dtype: which video transformer a command works with, and how it is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from corrdit.cli.devices import add_device_options, checked_device, checked_dtype


def add_model_options(parser: Any) -> None:
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    add_device_options(parser)


def add_preset_option(parser: Any) -> None:
    """--preset FILE, for commands without presets of another kind."""
    parser.add_argument(
        "--preset",
        default=None,
        metavar="FILE",
        help="a preset.json that `corrdit calibrate` wrote, in place of the model's own",
    )


def checked_preset(path: str | None) -> Any:
    """The `Preset` of a file, or None for None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a preset.
    """
    if path is None:
        return None
    from corrdit.integrations.diffusers import Preset

    return Preset.from_file(path)


def loaded_backbone(arguments: Any, preset: Any = None) -> Any:
    """The backbone of these options, loaded without the progress bars of the libraries underneath.

    Args:
        arguments: with model, device and dtype.
        preset: of `checked_preset`.

    Raises:
        ValueError: an unknown model, one that cannot be loaded, a preset of another model, or a device that is not
            there.
    """
    from corrdit.integrations.diffusers.backbones.loading import load_backbone

    device, dtype = checked_device(arguments.device), checked_dtype(arguments.dtype)
    given = {} if preset is None else {"preset": preset}
    with _quiet_libraries():
        return load_backbone(arguments.model, device=device, dtype=dtype, **given)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
