"""Which implementation runs an operation, and why another one cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.grid import TokenGrid

BACKENDS = ("auto", "triton", "streaming", "reference")

_MODULES = {"triton": "kernels", "streaming": "streaming", "reference": "reference"}

_logger = logging.getLogger("corrdit")


def select_backend(backend: str, tensor: Tensor) -> ModuleType:
    """The module that runs an operation on `tensor`.

    Raises:
        ValueError: an unknown name, or "triton" for float64 tensors.
        RuntimeError: "triton" where triton or a CUDA device is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _automatic(tensor.device.type, tensor.dtype)
    if backend == "triton":
        reason = triton_unavailable(tensor.device.type, tensor.dtype)
        if reason:
            kind = ValueError if tensor.dtype == torch.float64 else RuntimeError
            raise kind(f'backend="triton" cannot run: {reason}; use backend="streaming" or backend="auto"')
    return importlib.import_module(f"corrdit.{_MODULES[backend]}")


class BackendInput(NamedTuple):
    """Queries and keys as a backend takes them: `grid` and `key_mask` describe the tokens of `q` and `k`."""

    q: Tensor
    k: Tensor
    grid: TokenGrid
    key_mask: Tensor | None
    heads: str
    weights: Tensor | None


def backend_input(module: ModuleType, given: BackendInput, *, video_only: bool = True) -> BackendInput:
    """What an operation hands to a backend.

    The streaming backend takes everything as it is and reads the heads and the video tokens it needs block by block:
    a copy of the means over heads, or the padding of gradients of a slice, would grow with the video, past its budget.
    The others get the video tokens alone where no text takes part, and heads="features" as the one head of "logits"
    that the means over heads are.
    """
    if module.__name__ == f"corrdit.{_MODULES['streaming']}":
        return given
    q, k, grid, key_mask, heads, weights = given
    if video_only:
        q, k = q[:, :, grid.video_slice], k[:, :, grid.video_slice]
        key_mask = None if key_mask is None else key_mask[:, grid.video_slice]
        grid = grid.without_text()
    if heads == "features":
        assert weights is not None
        q, k = (torch.einsum("bhnd,h->bnd", t.to(weights.dtype), weights).unsqueeze(1) for t in (q, k))
        heads, weights = "logits", torch.ones(1, dtype=weights.dtype, device=q.device)
    return BackendInput(q, k, grid, key_mask, heads, weights)


def triton_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on such tensors, None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device != "cuda":
        return f"the tensors are on {device}, the kernels need a CUDA device (or TRITON_INTERPRET=1 for CPU tensors)"
    if torch.version.hip is not None:
        return "the kernels are tuned and tested for NVIDIA devices only, this PyTorch is built for AMD"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"the kernels need compute capability 8.0 or later, this device has {torch.cuda.get_device_capability()}"
    return None


@functools.cache
def _automatic(device: str, dtype: torch.dtype) -> str:
    """The backend "auto" stands for; the choice is logged once for each kind of tensor."""
    if device != "cuda":
        return "streaming"
    reason = triton_unavailable(device, dtype)
    if reason:
        _logger.warning('backend="auto" takes "streaming" for %s tensors on %s: %s', dtype, device, reason)
        return "streaming"
    _logger.info('backend="auto" takes "triton" for %s tensors on %s', dtype, device)
    return "triton"
