"""--model, --device and --dtype: which video transformer a command works with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from corrdit.cli.devices import add_device_options, checked_device, checked_dtype


def add_model_options(parser: Any) -> None:
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    add_device_options(parser)


def loaded_backbone(arguments: Any) -> Any:
    """The backbone of these options, loaded without the progress bars of the libraries underneath.

    Raises:
        ValueError: an unknown model, one that cannot be loaded, or a device that is not there.
    """
    from corrdit import load_backbone

    device, dtype = checked_device(arguments.device), checked_dtype(arguments.dtype)
    with _quiet_libraries():
        return load_backbone(arguments.model, device=device, dtype=dtype)


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
