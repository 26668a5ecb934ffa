"""Show what corrdit finds in this environment: versions, devices, and which backends can run or why not.

reads   installed packages and the machine; what is missing is never imported
writes  tables to standard output, or with --json one JSON object
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re

from corrdit.cli.terminal import print_table

HELP = "show versions, devices and backends, and why a backend cannot run"
EXAMPLES = ("corrdit doctor", "corrdit doctor --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    found, runs = versions(), {"backends": backends(), "attention": attention_implementations()}
    if arguments.json:
        print(json.dumps({"versions": found, "devices": devices(), **runs, "files": files()}, indent=1))
        return 0
    rows = [(name, entry["version"] or "not installed", entry["accepted"] or "") for name, entry in found.items()]
    print_table(("package", "version", "accepted"), rows, title="Versions")
    print_table(("device", "what"), list(devices().items()), title="Devices")
    for key, title in (("backends", "Backends of corrdit.ops"), ("attention", "Attention of the model (SDPA)")):
        states = [(name, "no" if reason else "yes", reason or "") for name, reason in runs[key].items()]
        print_table(("name", "runs here", "why not"), states, title=title)
    print_table(("what", "state"), list(files().items()), title="Models and videos")
    return 0


def versions() -> dict[str, dict[str, str | None]]:
    """Installed and accepted versions of Python, corrdit and its dependencies, by the packages' own metadata."""
    from corrdit.version import __version__

    found: dict[str, dict[str, str | None]] = {
        "python": {"version": platform.python_version(), "accepted": ">=3.10"},
        "corrdit": {"version": __version__, "accepted": ""},
    }
    for requirement in importlib.metadata.requires("corrdit") or []:
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([^;]*)", requirement)
        assert match is not None, requirement
        name, accepted = match[1], match[2].strip(" ()")
        if "extra ==" in requirement and name not in ("torchmetrics", "tensorboard"):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        found[name] = {"version": version, "accepted": accepted}
    return found


def devices() -> dict[str, str]:
    """Devices by torch's name for them, and where there is no GPU the reason."""
    import torch

    from corrdit.benchmark.environment import processor_name

    found = {"cpu": f"{processor_name()}, {torch.get_num_threads()} threads{_memory()}"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor},"
            f" {properties.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count() == 0:
        found["cuda"] = f"none: {no_cuda_reason()}"
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def no_cuda_reason() -> str:
    """Why torch sees no CUDA device."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and not os.environ["CUDA_VISIBLE_DEVICES"].strip("- 1"):
        return "CUDA_VISIBLE_DEVICES hides all devices"
    return "no driver, or no device that it shows"


def backends() -> dict[str, str | None]:
    """Backends of `corrdit.ops`, each with the reason why it cannot run here, or None where it can."""
    import torch

    from corrdit.ops.backends import triton_unavailable

    device = "cuda" if torch.cuda.is_available() else "cpu"
    triton = triton_unavailable(device, torch.float32)
    if triton and device == "cpu" and "not installed" not in triton:
        triton = f"{no_cuda_reason()}; TRITON_INTERPRET=1 runs the kernels slowly on the CPU"
    return {"triton": triton, "streaming": None, "reference": None}


def attention_implementations() -> dict[str, str | None]:
    """Implementations of scaled dot-product attention in torch, each with the reason why it cannot run, or None."""
    import torch

    found: dict[str, str | None] = {"math, and torch's own for the CPU": None}
    for name in ("flash", "mem_efficient", "cudnn"):
        reason = None
        if not torch.cuda.is_available():
            reason = no_cuda_reason()
        elif name == "flash" and not torch.backends.cuda.is_flash_attention_available():
            reason = "this torch was built without it"
        elif not getattr(torch.backends.cuda, f"{name}_sdp_enabled")():
            reason = "switched off in torch.backends.cuda"
        found[f"{name} (CUDA)"] = reason
    return found


def files() -> dict[str, str]:
    """Whether the embedded weights are there, whether the hub may be asked, and whether mp4 can be written."""
    found = {}
    if importlib.util.find_spec("diffusers") is None:
        found["embedded model"] = "needs diffusers, which is not installed"
    else:
        from corrdit.integrations.embedded.preset import WEIGHTS

        weights = sorted(WEIGHTS.rglob("*.safetensors"))
        size = sum(file.stat().st_size for file in weights) / 1e6
        found["embedded model"] = f"{size:.1f} MB of weights in the package" if weights else "weights are missing"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    found["model hub"] = "not asked: HF_HUB_OFFLINE is set" if offline else "asked for hub ids"
    if importlib.util.find_spec("av") is None:
        found["mp4 (H.264)"] = "needs PyAV, which is not installed"
    else:
        import av

        found["mp4 (H.264)"] = "can be written" if "libx264" in av.codecs_available else "this PyAV has no libx264"
    return found


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB memory"
    except (ValueError, OSError, AttributeError):  # no sysconf on Windows
        return ""
