"""Which implementation runs an operation, and why another one cannot."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from corrdit.arguments import choice
from corrdit.grid import TokenGrid
from corrdit.kernels.shared.configs import HEAD_DIMS

BACKENDS = ("auto", "triton", "streaming", "reference")

_logger = logging.getLogger("corrdit")


def select_backend(backend: str, tensor: Tensor) -> ModuleType:
    """The module that runs an operation on `tensor`; torch.compile traces through it.

    Raises:
        ValueError: an unknown name, or "triton" for float64 tensors or a head_dim the kernels do not take.
        RuntimeError: "triton" where triton or a CUDA device is missing.
    """
    choice("backend", backend, BACKENDS)
    unfit = _unfit_tensor(tensor.dtype, tensor.shape[-1])
    if backend == "auto":
        backend = _fixed_choice(tensor.device.type, tensor.dtype, unfit)
    elif backend == "triton" and (reason := unfit or _fixed_reason(tensor.device.type)):
        kind = ValueError if unfit else RuntimeError
        raise kind(f'backend="triton" cannot run: {reason}; use backend="streaming" or backend="auto"')
    if torch.compiler.is_compiling():
        _load(backend)
    return _module(backend)


def _module(backend: str) -> ModuleType:
    # Statements, because a traced function may import, but not by name.
    if backend == "triton":
        from corrdit import kernels

        return kernels
    if backend == "streaming":
        from corrdit import streaming

        return streaming
    from corrdit import reference

    return reference


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves the operations alone: their results are float32 whatever their inputs are."""
    return torch.autocast(tensor.device.type, enabled=False)


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
    if module.__name__ == "corrdit.streaming":
        return given
    q, k, grid, key_mask, heads, weights = given
    if video_only:
        q, k = q[:, :, grid.video_slice], k[:, :, grid.video_slice]
        key_mask = None if key_mask is None else key_mask[:, grid.video_slice]
        grid = grid.without_text()
    if heads == "features":
        assert weights is not None
        with full_precision(q):
            q, k = (torch.einsum("bhnd,h->bnd", t.to(weights.dtype), weights).unsqueeze(1) for t in (q, k))
        if module.__name__ == "corrdit.kernels" and given.q.dtype in (torch.float16, torch.bfloat16):
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


def _unfit_tensor(dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not take such tensors on any machine."""
    if dtype == torch.float64:
        return "the kernels take float16, bfloat16 and float32, not float64"
    least, most = HEAD_DIMS
    if head_dim is not None and not least <= head_dim <= most:
        return f"the kernels take head_dim {least} to {most}, got {head_dim}"
    return None


def triton_unavailable(device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on such tensors, None where they can; `head_dim` None stands for any."""
    return _unfit_tensor(dtype, head_dim) or _unfit_machine(device)


def _unfit_machine(device: str) -> str | None:
    """Why the kernels cannot run here on tensors of a kind of device."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
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
def _automatic(device: str, dtype: torch.dtype, unfit: str | None) -> str:
    """The backend "auto" stands for; the choice is logged once for each kind of tensor.

    On a CUDA device it is the kernels, and the streaming backend, with a warning that says why, for what they do not
    take: float64, head_dim outside 8 to 256, AMD devices and compute capability below 8.0.
    """
    if device != "cuda":
        return "streaming"
    reason = unfit or _unfit_machine(device)
    if reason:
        _logger.warning('backend="auto" takes "streaming" for %s tensors on %s: %s', dtype, device, reason)
        return "streaming"
    _logger.info('backend="auto" takes "triton" for %s tensors on %s', dtype, device)
    return "triton"


def _fixed_choice(device: str, dtype: torch.dtype, unfit: str | None) -> str:
    return _automatic(device, dtype, unfit)


def _fixed_reason(device: str) -> str | None:
    return _unfit_machine(device)


def _load(backend: str) -> None:
    """Imports all of a backend: a traced function cannot ask a package for what it loads on demand."""
    module = _module(backend)
    for name in module.__all__:
        getattr(module, name)


# A compiled caller asks these once, while it is traced: what they look at is no part of a graph. The attribute is what
# torch.compiler.assume_constant_result sets, whose import of the compiler would take seconds here.
for _function in (_fixed_choice, _fixed_reason, _load):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]
