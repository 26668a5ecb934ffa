"""Checks of the device and precision given on the command line."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def add_device_options(parser: ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps ...; the model decides if left out")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="precision of the model; its own if left out")


def checked_device(name: str | None) -> torch.device | None:
    """A `torch.device` that exists here, or None for None.

    Raises:
        ValueError: no such kind of device, or none of it in this machine.
    """
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not a device; accepted are {', '.join(usable_devices())}") from error
    if device.type != "meta" and f"{device.type}:{device.index or 0}" in usable_devices(indexed=True):
        return device
    raise ValueError(f"--device {name} is not usable here; accepted are {', '.join(usable_devices())}")


def checked_dtype(name: str | None) -> torch.dtype | None:
    """The `torch.dtype` of a name of `DTYPES`, or None for None."""
    import torch

    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def usable_devices(indexed: bool = False) -> list[str]:
    """Names of the devices torch can use in this machine, the CPU first; "cpu:0" and so on when `indexed`."""
    import torch

    names = ["cpu:0"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps:0")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        names += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return names if indexed else [name.removesuffix(":0") for name in names]
