"""Options that say where and how a command runs, and tables of options, shared by all that have them; their checks."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from argparse import _ArgumentGroup as ArgumentGroup

    import torch
    from jsonargparse import ArgumentParser, Namespace

OptionTable = dict[str, tuple[Any, str]]
"""Type and help text of options by their names as arguments of a function."""
PLACEMENTS = ("device", "offload", "offload_groups", "offload_layers", "shards")
WEIGHTS = ("own", "float8", "int8")
"""Both those of `corrdit.integrations.diffusers.placement`."""


class TrainerDevices(TypedDict):
    """Where Lightning's Trainer runs."""

    accelerator: str
    devices: int | list[int]


def add_device_options(parser: ArgumentParser) -> None:
    """--device, --dtype and `add_fitting_options`."""
    from corrdit.arguments import DTYPES

    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps ...; the model decides if left out")
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        default=None,
        help=f"{', '.join(DTYPES)}: precision of the model; its own if left out",
    )
    add_fitting_options(parser)


def add_fitting_options(parser: ArgumentParser) -> None:
    """--placement, --codec-tiling, --codec-slicing and --weights: how a model is made to fit."""
    parser.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default=None,
        help="for a model too large for one GPU: offload its parts, blocks or layers to the computer's"
        " memory, or spread it in shards over all GPUs of one process; all of it on the device if left out",
    )
    parser.add_argument(
        "--codec-tiling", type=bool | None, default=None, help="encode and decode frames in tiles; far less memory"
    )
    parser.add_argument(
        "--codec-slicing", type=bool | None, default=None, help="encode and decode the videos of a batch one by one"
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default=None,
        help="of the transformer: own precision, float8 (cast layer by layer) or int8 (torchao); the last two take half"
        " of bfloat16",
    )


def add_shards_option(parser: ArgumentParser | ArgumentGroup) -> None:
    """--incomplete."""
    parser.add_argument(
        "--incomplete", action="store_true", help="take the shards of TAP-Vid that are there; some may be missing"
    )


def dtype_name(name: str) -> str:
    """As `dtype_name`, for the parser."""
    from corrdit.arguments import dtype_name

    try:
        return dtype_name("--dtype", name)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def add_run_options(parser: ArgumentParser | ArgumentGroup, *, on_broken: str = "report") -> None:
    """--processes and --on-broken, for commands that make many results."""
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="share the work out over N processes or GPUs"
    )
    parser.add_argument(
        "--on-broken",
        choices=("report", "raise"),
        default=on_broken,
        help="report names what cannot be done and goes on without it; raise stops there",
    )


def add_options(parser: ArgumentParser | ArgumentGroup, options: OptionTable, words: str = "") -> None:
    """One option for each entry, unset unless it is given; `words` go after each text."""
    for name, (kind, text) in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind | None, default=None, help=text + words)


def given_options(arguments: Namespace, options: Iterable[str]) -> dict[str, Any]:
    """The options, of a table or by their names, that were given."""
    return {name: arguments[name] for name in options if arguments[name] is not None}


def named(arguments: Namespace, *names: str) -> dict[str, Any]:
    """Arguments by name, for a function that has them under the same names."""
    return {name: arguments[name] for name in names}


def trainer_devices(arguments: Namespace, *, unset: str = "cpu") -> TrainerDevices:
    """The Trainer's accelerator and devices, from --device (`unset` where it is left out) and --processes.

    Raises:
        ValueError: no such device here, or one device for several processes.
    """
    device, processes = checked_device(arguments.device), arguments.processes
    if processes < 1:
        raise ValueError(f"--processes {processes} was given; accepted is a number of 1 or more")
    kind = unset if device is None else device.type
    accelerator = "gpu" if kind == "cuda" else kind
    if device is None or device.index is None or kind != "cuda":
        return {"accelerator": accelerator, "devices": processes}
    if processes > 1:
        raise ValueError(f"--device {device} is one device; for {processes} processes give --device {kind}")
    return {"accelerator": accelerator, "devices": [device.index]}


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
    why = f" ({_why_no_cuda()})" if device.type == "cuda" else ""
    raise ValueError(f"--device {name} is not usable here; accepted are {', '.join(usable_devices())}{why}")


def _why_no_cuda() -> str:
    import torch

    if count := torch.cuda.device_count():
        return f"there are {count} CUDA devices, counted from 0"
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, is built without CUDA; install one with it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split("\n")[0]
    return "torch sees no CUDA device; is one hidden by CUDA_VISIBLE_DEVICES?"


def usable_devices(indexed: bool = False) -> list[str]:
    """Names of the devices torch can use in this machine, the CPU first; "cpu:0" and so on when `indexed`."""
    import torch

    names = ["cpu:0"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps:0")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        names += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return names if indexed else [name.removesuffix(":0") for name in names]
