"""What the kernels take, said once: dtypes, head_dim, machines. Asked before anything of triton is loaded."""

from __future__ import annotations

import importlib.util

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Smaller ones would be mostly padding, larger ones leave no room for accumulators.
HEAD_DIMS = (8, 256)


def unfit_tensor(dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not take such tensors on any machine; `head_dim` None stands for any."""
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    least, most = HEAD_DIMS
    if head_dim is not None and not least <= head_dim <= most:
        return f"the kernels take head_dim {least} to {most}, got {head_dim}"
    return None


def unfit_machine(device: str, interpreted: bool) -> str | None:
    """Why the kernels cannot run here on tensors of a device.

    Args:
        device: its name: "cpu", "cuda", "cuda:1".
        interpreted: whether triton runs kernels on CPU tensors in this process.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and interpreted:
        return None
    if device.partition(":")[0] != "cuda":
        return (
            f"the tensors are on {device}, the kernels need a CUDA device (or TRITON_INTERPRET=1, set before triton is "
            "imported, for CPU tensors)"
        )
    if torch.version.hip is not None:
        return "the kernels are tuned and tested for NVIDIA devices only, this PyTorch is built for AMD"
    if (capability := torch.cuda.get_device_capability(torch.device(device))) < (8, 0):
        return f"the kernels need compute capability 8.0 or later, {device} has {capability[0]}.{capability[1]}"
    return None
