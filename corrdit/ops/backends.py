"""Which implementation runs an operation, and why another one cannot."""

from __future__ import annotations

import functools
import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from corrdit.arguments import choice
from corrdit.kernels.requirements import PLANNED, device_of, unfit_machine, unfit_tensor
from corrdit.problem import PairProblem

BACKENDS = ("auto", "triton", "streaming", "reference")

_logger = logging.getLogger("corrdit")


class Backend(Protocol):
    """An implementation of every operation: a module of these functions.

    Their results have an axis of heads `[B, H or 1, ...]`, and one of R rows in place of (pair, row, column): the
    queries of every pair one after the other (`PairProblem.pair_rows`).
    """

    def soft_displacement(self, q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor | None]:
        """(displacement `[B, H or 1, R, 2]`, log-sum-exp `[B, H or 1, R]` if asked for)."""

    def hard_displacement(self, q: Tensor, k: Tensor, problem: PairProblem) -> Tensor:
        """int64 `[B, H or 1, R, 2]`."""

    def match(
        self, q: Tensor, k: Tensor, problem: PairProblem, *, bidirectional: bool, refine: int
    ) -> tuple[Tensor, Tensor]:
        """(xy `[B, H or 1, R, 2]`, score `[B, H or 1, R]`); the pairs are (source, target)."""

    def cost_rows(self, q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, bidirectional: bool) -> Tensor:
        """`[B, H or 1, P, F, S]` of P tokens of the source frame; the pairs are (source, every frame)."""

    def attention_mass(
        self, q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, source: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(text, frames, text peak, frame peak), `[B, H or 1, P]` and `[B, H or 1, P, F]`."""

    def frame_local_attention(
        self, q: Tensor, k: Tensor, v: Tensor, problem: PairProblem, *, renormalize: bool, span: int
    ) -> tuple[Tensor, Tensor | None]:
        """(attention in the shape and dtype of q, log-sum-exp `[B, H, tokens of q]` if asked for)."""


def select_backend(backend: str, q: Tensor, problem: PairProblem) -> Backend:
    """The implementation that runs an operation; see `backend_name`. torch.compile traces through it."""
    name = backend_name(backend, q, problem)
    if torch.compiler.is_compiling():
        _load(name)
    return _module(name)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run on this machine or on such tensors' device."""


def backend_name(backend: str, q: Tensor, problem: PairProblem | None = None) -> str:
    """What a name stands for: "triton", "streaming" or "reference"; for the problem or for plain tensors like q.

    Raises:
        ValueError: an unknown name, "triton" for what the kernels do not take, or a memory budget for a backend that
            keeps none.
        RuntimeError: "triton" where triton or a CUDA device is missing.
    """
    choice("backend", backend, BACKENDS)
    unfit = unfit_tensor(q.dtype, q.shape[-1])
    if problem is not None:
        check_budget(backend, problem.memory_budget)
    if backend == "auto":
        return _fixed_choice(device_of(q), q.dtype, unfit)
    if backend == "triton" and (reason := unfit or _fixed_reason(device_of(q))):
        kind = ValueError if unfit else BackendUnavailableError
        raise kind(f'backend="triton" cannot run: {reason}; use backend="streaming" or backend="auto"')
    return backend


def check_budget(backend: str, memory_budget: int | None) -> None:
    """Raises ValueError for a memory budget that the backend would ignore."""
    if memory_budget is not None and backend in ("triton", "reference"):
        raise ValueError(f'memory_budget is for backend="streaming" or "auto"; backend="{backend}" would ignore it')


def _module(name: str) -> Backend:
    # Statements, because a traced function may import, but not by name.
    if name == "triton":
        from corrdit.kernels import operations

        return operations
    if name == "streaming":
        from corrdit import streaming

        return streaming
    from corrdit import reference

    return reference


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast leaves the operations alone: their results are float32 whatever their inputs are."""
    return torch.autocast(tensor.device.type, enabled=False)


def triton_unavailable(device: str, dtype: torch.dtype, head_dim: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on such tensors, None where they can; `head_dim` None stands for any."""
    return unfit_tensor(dtype, head_dim) or _fixed_reason(device)


@functools.cache
def _automatic(device: str, dtype: torch.dtype, unfit: str | None) -> str:
    """The backend "auto" stands for; the choice is logged once for each kind of tensor.

    On a CUDA device it is the kernels, and the streaming backend, with a warning that says why, for what they do not
    take: float64, head_dim outside 8 to 256, AMD devices and compute capability below 8.0.
    """
    if device != PLANNED and device.partition(":")[0] != "cuda":
        return "streaming"
    reason = unfit or _fixed_reason(device)
    if reason:
        _logger.warning('backend="auto" takes "streaming" for %s tensors on %s: %s', dtype, device, reason)
        return "streaming"
    _logger.info('backend="auto" takes "triton" for %s tensors on %s', dtype, device)
    return "triton"


def _fixed_choice(device: str, dtype: torch.dtype, unfit: str | None) -> str:
    return _automatic(device, dtype, unfit)


def _fixed_reason(device: str) -> str | None:
    return unfit_machine(device, os.environ.get("TRITON_INTERPRET") == "1")


def _load(name: str) -> None:
    """Imports a backend: a traced function finds only what is loaded."""
    _module(name)


# A compiled caller asks these once, while it is traced: what they look at is no part of a graph. The attribute is what
# torch.compiler.assume_constant_result sets, whose import of the compiler would take seconds here.
for _function in (_fixed_choice, _fixed_reason, _load):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]
