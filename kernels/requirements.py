"""What the kernels take, said once: dtypes, head_dim, machines. Asked before anything of triton is loaded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Smaller ones would be mostly padding, larger ones leave no room for accumulators.
HEAD_DIMS = (8, 256)


PLANNED = "planned"
"""The kind of device that fake tensors stand on while a run on a GPU is planned, wherever they are."""
_planned = False


@contextlib.contextmanager
def planned_gpu() -> Iterator[None]:
    """Within it, fake tensors stand for those of a GPU that takes the kernels; nothing may be launched."""
    global _planned  # noqa: PLW0603
    before, _planned = _planned, True
    try:
        yield
    finally:
        _planned = before


def device_of(tensor: torch.Tensor) -> str:
    """The name of a tensor's device, such as "cuda:1", or `PLANNED`."""
    # Another thread may be at work on tensors with contents meanwhile.
    return PLANNED if _planned and has_no_contents(tensor) else str(tensor.device)


def has_no_contents(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def unfit_tensor(dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not take such tensors on any machine; `head_dim` None stands for any."""
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    least, most = HEAD_DIMS
    if head_dim is not None and not least <= head_dim <= most:
        return f"the kernels take head_dim {least} to {most}, got {head_dim}"
    return None


def unwritable_cache() -> str | None:
    """Why triton cannot keep what it compiles, None where it can."""
    place = os.environ.get("TRITON_CACHE_DIR")
    if not place:
        home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
        place = os.path.join(home, ".triton", "cache")
    existing = os.path.abspath(place)
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):
        return None
    return f"triton cannot write its cache {place}; set TRITON_CACHE_DIR to a folder that can be written"


def unfit_interpreter(triton: str | None, numpy: str) -> str | None:
    """Why a version of triton cannot run kernels on CPU tensors beside one of numpy, None where it can."""
    if triton is None or _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton} does not run with numpy {numpy}; install numpy below 2.4, or triton 3.7 "
        "or newer"
    )


def _release(version: str) -> tuple[int, ...]:
    """(2, 4) of "2.4.6"."""
    return tuple(int(part) for part in version.split(".")[:2])


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# Once, for a traced caller cannot ask.
_UNFIT_INTERPRETER = unfit_interpreter(_installed("triton"), numpy.__version__)


def unfit_machine(device: str, interpreted: bool) -> str | None:
    """Why the kernels cannot run here on tensors of a device.

    Args:
        device: its name: "cpu", "cuda", "cuda:1".
        interpreted: whether triton runs kernels on CPU tensors in this process.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == PLANNED:
        return None
    if device == "cpu" and interpreted:
        return _UNFIT_INTERPRETER
    if device.partition(":")[0] != "cuda":
        return (
            f"the tensors are on {device}, the kernels need a CUDA device (or TRITON_INTERPRET=1, set before triton is "
            "imported, for CPU tensors)"
        )
    if reason := unwritable_cache():
        return reason
    if torch.version.hip is not None:
        return "the kernels are tuned and tested for NVIDIA devices only, this PyTorch is built for AMD"
    if (capability := torch.cuda.get_device_capability(torch.device(device))) < (8, 0):
        return f"the kernels need compute capability 8.0 or later, {device} has {capability[0]}.{capability[1]}"
    return None
