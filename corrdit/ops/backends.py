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
from corrdit.kernels.configs import HEAD_DIMS

BACKENDS = ("auto", "triton", "streaming", "reference")

_MODULES = {"triton": "kernels", "streaming": "streaming", "reference": "reference"}

_logger = logging.getLogger("corrdit")


def select_backend(backend: str, tensor: Tensor) -> ModuleType:
    """The module that runs an operation on `tensor`.

    Raises:
        ValueError: an unknown name, or "triton" for float64 tensors or a head_dim the kernels do not take.
        RuntimeError: "triton" where triton or a CUDA device is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = _automatic(tensor.device.type, tensor.dtype, tensor.shape[-1])
    if backend == "triton":
        reason = triton_unavailable(tensor.device.type, tensor.dtype, tensor.shape[-1])
        if reason:
            unfit = tensor.dtype == torch.float64 or _unfit_head_dim(tensor.shape[-1]) is not None
            kind = ValueError if unfit else RuntimeError
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
    that the means over heads are. For 16-bit inputs the kernels get three heads of "logits" instead, which add up to
    that one; see `_tensor_core_parts`.
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
        if module.__name__ == f"corrdit.{_MODULES['triton']}" and given.q.dtype in (torch.float16, torch.bfloat16):
            q, k = _tensor_core_parts(q, k, given.q.dtype)
        heads = "logits"
        weights = torch.full((1,), 1 / q.shape[1], dtype=weights.dtype, device=q.device).expand(q.shape[1])
    return BackendInput(q, k, grid, key_mask, heads, weights)


def _tensor_core_parts(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three heads of a 16-bit dtype whose mean of q.k is that of the one float32 head, as exact and on tensor cores.

    With q = q_high + q_low the sum of the roundings to `dtype` and of what they leave, q.k is
    q_high.k_high + q_high.k_low + q_low.k_high up to the square of a rounding. One rounding alone costs up to 0.25
    tokens of displacement in bfloat16 where the attention is sharp (logits of 3 x 3 standard deviations over 15 x 20
    tokens), the three parts 4e-4, what is lost to float16 softmax weights anyway.

    Args:
        q, k: float32 `[B, 1, N, D]`.

    Returns:
        `[B, 3, N, D]` in `dtype`. The gradient of each input is that of its rounding, which stands for the whole.
    """
    highs, lows = [], []
    for tensor in (3.0 * q, k):  # the mean over three heads divides by 3
        highs.append(tensor.to(dtype))
        lows.append((tensor - highs[-1].to(tensor.dtype)).detach().to(dtype))
    return torch.cat((highs[0], highs[0], lows[0]), 1), torch.cat((highs[1], lows[1], highs[1]), 1)


def _unfit_head_dim(head_dim: int) -> str | None:
    least, most = HEAD_DIMS
    return None if least <= head_dim <= most else f"the kernels take head_dim {least} to {most}, got {head_dim}"


def triton_unavailable(device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on such tensors, None where they can; `head_dim` None stands for any."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    if head_dim is not None and (reason := _unfit_head_dim(head_dim)):
        return reason
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
def _automatic(device: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend "auto" stands for; the choice is logged once for each kind of tensor.

    On a CUDA device it is the kernels, and the streaming backend, with a warning that says why, for what they do not
    take: float64, head_dim outside 8 to 256, AMD devices and compute capability below 8.0.
    """
    if device != "cuda":
        return "streaming"
    reason = triton_unavailable(device, dtype, head_dim)
    if reason:
        _logger.warning('backend="auto" takes "streaming" for %s tensors on %s: %s', dtype, device, reason)
        return "streaming"
    _logger.info('backend="auto" takes "triton" for %s tensors on %s', dtype, device)
    return "triton"
