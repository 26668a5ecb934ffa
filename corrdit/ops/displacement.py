"""Displacement of every token of one frame to another frame: soft (expected) and hard (best)."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from corrdit.arguments import whole_number
from corrdit.grid import FramePairs, TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import BackendInput, backend_input, full_precision, select_backend


class DisplacementRequest(NamedTuple):
    """What a backend is called with, and how its frame pairs are to be arranged.

    Attributes:
        backend: the module that runs it.
        arguments: q, k, grid and pairs as that backend takes them.
        options: everything else, by name.
        shape: of the field of displacements as the caller asked for it.
    """

    backend: ModuleType
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]

    def result(self, operation: str) -> Tensor:
        """The backend's field of displacements in `shape`."""
        with full_precision(self.arguments[0]):
            displacement: Tensor = getattr(self.backend, operation)(*self.arguments, **self.options)
        return displacement.view(self.shape)


def soft_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Expected displacement of every token under its attention on each frame: the attention motion flow.

    For query token p of frame i and every frame j, `sum_p' P[p, p'] (p' - p)` with P the softmax over the tokens p' of
    frame j of `temperature * scale * q.k`. Source: DiTFlow, "Video Motion Transfer with Diffusion Transformers"
    (arXiv 2412.07776), attention motion flow.

    Args:
        q, k: `[B, H, N, D]` float16, bfloat16, float32 or float64. Text tokens take no part.
        grid: how the N tokens are arranged.
        heads: what is averaged over heads before the expectation: "logits", "features" (q and k), "probabilities", or
            "none" to keep the heads apart.
        head_weights: `[H]` non-negative weights of the heads in that average, normalised to sum 1.
        temperature: multiplies the logits; above 0.
        frames: None for all pairs, an int for `|i - j| <= frames`, or a list of (query frame, key frame).
        window: radius in tokens, in both axes, of the keys a query sees; clipped at the border.
        center: `[B, F, F, h, w, 2]` (or `[B, P, h, w, 2]` with `frames`) place (x, y) in tokens of the key frame round
            which the window lies, rounded to a token and moved into the frame; the query's own place by default.
        scale: factor of q.k, `D ** -0.5` by default.
        key_mask: bool `[B, N]`, True = may be attended. A query without any key gets displacement 0.
        backend: "auto", "triton", "streaming" or "reference". "auto" is "triton" for CUDA tensors and "streaming" for
            all others; also, with a warning in the log that says why, for CUDA tensors the kernels do not take
            (float64, head_dim outside 8 to 256, AMD devices, compute capability below 8.0).
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        (dx, dy) in tokens, x to the right and y down, float32 (float64 for float64 input):
        `[B, F, F, h, w, 2]` (query frame, key frame, row, column), or `[B, P, h, w, 2]` with `frames`; with
        heads="none" a head axis after the batch. Differentiable in q and k, once.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    request = displacement_request(
        q, k, grid, heads=heads, head_weights=head_weights, temperature=temperature, frames=frames, window=window,
        center=center, scale=scale, key_mask=key_mask, backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    return request.result("soft_displacement")


@torch.no_grad()
def hard_displacement(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str = "logits",
    head_weights: Tensor | Iterable[float] | None = None,
    temperature: float = 1.0,
    frames: int | Iterable[tuple[int, int]] | None = None,
    window: int | None = None,
    center: Tensor | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    """Displacement of every token to the key of largest weight in each frame.

    Takes the arguments of `soft_displacement`; the argmax stands in place of the expectation, ties go to the lowest
    flat index, and NaN behaves as in `torch.argmax`. Source: DiTFlow (arXiv 2412.07776), reference motion flow.

    Returns:
        int64 (dx, dy) in tokens, in the shape of `soft_displacement`. Not differentiable.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    request = displacement_request(
        q, k, grid, heads=heads, head_weights=head_weights, temperature=temperature, frames=frames, window=window,
        center=center, scale=scale, key_mask=key_mask, backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    return request.result("hard_displacement")


def displacement_request(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    *,
    heads: str,
    head_weights: Tensor | Iterable[float] | None,
    temperature: float,
    frames: int | Iterable[tuple[int, int]] | None,
    window: int | None,
    center: Tensor | None,
    scale: float | None,
    key_mask: Tensor | None,
    backend: str,
    memory_budget: int | None,
) -> DisplacementRequest:
    """The checked arguments of `soft_displacement`, for the backend they are meant for."""
    checks.check_tokens(grid, q=q, k=k)
    weights = checks.check_heads(heads, head_weights, q)
    pairs = grid.frame_pairs(frames)
    options: dict[str, Any] = {
        "scale": checks.check_scale(scale, q.shape[-1]),
        "temperature": checks.check_factor("temperature", temperature),
        "window": None if window is None else min(whole_number("window", window, 0), max(grid.height, grid.width)),
        "memory_budget": checks.check_budget(memory_budget),
    }
    options["center"] = _check_center(center, options["window"], q, grid, pairs, square=frames is None)
    module = select_backend(backend, q)
    given = backend_input(module, BackendInput(q, k, grid, checks.check_key_mask(key_mask, q), heads, weights))
    options.update(heads=given.heads, weights=given.weights, key_mask=given.key_mask)
    pair_axes = (grid.frames, grid.frames) if frames is None else (len(pairs),)
    head_axes = (q.shape[1],) if heads == "none" else ()
    shape = (q.shape[0], *head_axes, *pair_axes, grid.height, grid.width, 2)
    return DisplacementRequest(module, (given.q, given.k, given.grid, pairs), options, shape)


def _check_center(
    center: Tensor | None, window: int | None, q: Tensor, grid: TokenGrid, pairs: FramePairs, *, square: bool
) -> Tensor | None:
    """`[B, P, h, w, 2]` floating point, whatever way the pairs were asked for."""
    if center is None:
        return None
    if window is None:
        raise ValueError("center places a window, but window is None; give the radius of the window in tokens")
    pair_axes = [grid.frames, grid.frames] if square else [len(pairs)]
    expected = [q.shape[0], *pair_axes, grid.height, grid.width, 2]
    if not isinstance(center, Tensor) or list(center.shape) != expected or center.device != q.device:
        given = f"{list(center.shape)} on {center.device}" if isinstance(center, Tensor) else type(center).__name__
        raise ValueError(f"center must be a tensor {expected} on {q.device}, got {given}")
    center = center.detach()
    if center.is_complex():
        raise ValueError(f"center must be real, got {center.dtype}")
    if not center.is_floating_point():
        center = center.to(torch.float32)
    if checks.may_read(center) and not bool(torch.isfinite(center).all()):
        raise ValueError("center must be finite, got NaN or infinity in it")
    return center.reshape(q.shape[0], len(pairs), grid.height, grid.width, 2)
