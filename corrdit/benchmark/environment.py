"""What a figure was measured on and with."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess

import torch

from corrdit import version as version_file


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Commit, device, driver and versions, as they stand in every row of results."""
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "corrdit": version_file.__version__,
        "commit": commit(),
        "device": device_name(device),
        "driver": _command_output(*driver, f"--id={device.index or 0}") if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
    }


def commit() -> str | None:
    """The commit of the checkout the package is run from, "+" for uncommitted changes; None for an installed wheel."""
    folder = pathlib.Path(version_file.__file__).parent
    if _command_output("git", "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _command_output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _command_output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def device_name(device: torch.device) -> str:
    """The marketing name of a GPU, or the CPU's model and core count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


def processor_name() -> str:
    """The CPU's model, or its architecture where the system says no more."""
    information = pathlib.Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command_output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
