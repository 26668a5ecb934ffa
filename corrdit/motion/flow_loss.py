"""Attention motion flow as a loss: the displacement of every token between frames, pulled towards a reference's.

Source: DiTFlow, "Video Motion Transfer with Diffusion Transformers" (arXiv 2412.07776).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from corrdit import ops, streaming
from corrdit.arguments import whole_number
from corrdit.grid import TokenGrid
from corrdit.ops.backends import backend_name, full_precision, select_backend
from corrdit.ops.displacement import by_heads, displacement_problem

FLOW_LOSSES = ("released", "paper", "pairs")


def flow_loss(flow: Tensor, reference: Tensor, *, variant: str = "released", weights: Tensor | None = None) -> Tensor:
    """Difference between two fields of displacements.

    Args:
        flow: `[..., 2]` (dx, dy) in tokens, of the video being made; the loss is differentiable in it.
        reference: the same shape, float or integer, of the video whose motion is wanted.
        variant: "released" is the mean squared error over the components of those vectors whose reference is not zero
            (DiTFlow's code); "paper" the squared norm of the whole difference; "pairs" that norm averaged over the
            pairs of frames (FastVMT, arXiv 2602.05551), where the last axes are (row, column, (dx, dy)).
        weights: of the squared differences of the vectors, in a shape that broadcasts to that of `flow` without its
            last axis; None for 1. "released" divides by their sum over the vectors that count.

    Returns:
        Scalar in the precision of `flow`.

    Raises:
        ValueError: shapes that differ, an unknown variant, weights that count nothing, or "released" with a reference
            that is zero everywhere.
    """
    _check_variant(variant)
    if flow.shape != reference.shape or flow.ndim < 2 or flow.shape[-1] != 2:
        raise ValueError(
            f"flow and reference must be displacements [..., 2] of one shape, got {list(flow.shape)} and "
            f"{list(reference.shape)}"
        )
    counted, divisor = _counted(reference, variant, weights)
    squared = (flow - reference.to(flow)).square()
    # Multiplying by the mask keeps the shape, where picking the vectors would wait for the device.
    return (squared if counted is None else squared * counted.to(flow.dtype)).sum() / divisor


def attention_flow_loss(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    reference: Tensor,
    *,
    variant: str = "released",
    weights: Tensor | None = None,
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
    """`flow_loss(ops.soft_displacement(q, k, grid, ...), reference)`, faster where its gradient is wanted.

    The streaming backend finds the gradients in q and k in the same pass over the attention as the loss, with three
    matrix products instead of four, and keeps them, in float32 (float64 for float64 input), until the backward pass
    scales them. It does so for every `heads` but "probabilities". That, the other backends, whose kernels compute the
    attention again cheaply, and a loss without gradients are the composition itself.

    Args:
        q, k: `[B, H, N, D]`; the loss is differentiable in them, once.
        grid: how the N tokens are arranged.
        reference: displacements of the video whose motion is wanted, float or integer, in the shape that
            `soft_displacement` gives for the same arguments.
        variant, weights: as for `flow_loss`.
        heads, head_weights, temperature, frames, window, center, scale, key_mask, backend: as for `soft_displacement`.
        memory_budget: bytes beyond inputs, outputs and gradients (streaming).

    Returns:
        Scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: what `soft_displacement` and `flow_loss` refuse.
        RuntimeError: the backend asked for cannot run here.
    """
    _check_variant(variant)
    problem, axes = displacement_problem(
        q, k, grid, heads=heads, head_weights=head_weights, temperature=temperature, frames=frames, window=window,
        center=center, scale=scale, key_mask=key_mask, memory_budget=memory_budget,
    )  # fmt: skip
    shape = [q.shape[0], *([q.shape[1]] if heads == "none" else []), *axes.lengths, 2]
    if not isinstance(reference, Tensor) or list(reference.shape) != shape:
        given = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(f"reference must be a tensor of displacements {shape}, got {given}")
    reference = reference.to(q.device)
    counted, divisor = _counted(reference, variant, weights)
    q, k, problem = problem.of_read_heads(q, k)
    name = backend_name(backend, q, problem)
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if name != "streaming" or heads == "probabilities" or reference.requires_grad or not differentiated:
        with full_precision(q):
            rows, _ = select_backend(backend, q, problem).soft_displacement(q, k, problem)
        return flow_loss(by_heads(rows, problem, axes), reference, variant=variant, weights=weights)
    rows = reference.reshape(q.shape[0], -1, problem.rows, 2)
    if counted is not None:
        counted = counted.to(q.device).expand(*reference.shape[:-1], 1).reshape(q.shape[0], -1, problem.rows, 1)
    return streaming.soft_displacement_error(q, k, problem, rows, weights=counted) / divisor


def _check_variant(variant: str) -> None:
    if variant not in FLOW_LOSSES:
        raise ValueError(f"variant must be one of {', '.join(map(repr, FLOW_LOSSES))}, got {variant!r}")


def _counted(reference: Tensor, variant: str, weights: Tensor | None) -> tuple[Tensor | None, float]:
    """Weights of the vectors `[..., 1]`, None for 1, and what the sum of squares is divided by.

    Raises:
        ValueError: nothing counts.
    """
    if weights is not None:
        shape = reference.shape[:-1]
        axes = zip(weights.shape[::-1], shape[::-1], strict=False) if isinstance(weights, Tensor) else ()
        if not isinstance(weights, Tensor) or weights.ndim > len(shape) or any(a not in (1, b) for a, b in axes):
            given = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights must be a tensor that broadcasts to the vectors {list(shape)}, got {given}")
        weights = weights.to(reference.device)[..., None]
        if not bool((weights != 0).any()):
            raise ValueError("weights are all zero, so no vector counts; give some that are not")
    if variant != "released":
        return weights, 1 if variant == "paper" else reference.shape[:-3].numel()
    moving = (reference != 0).any(-1, keepdim=True)
    counted = moving if weights is None else moving * weights
    count = counted.sum().item()
    if count == 0:
        raise ValueError(
            "the reference's displacements are all zero: nothing in it moves by a token or more, so there is no motion "
            'to follow; take a reference with motion, another block, or variant="paper"'
        )
    return counted, 2 * count


def coarse_centers(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tile: int | tuple[int, int],
    *,
    heads: str = "logits",
    frames: int | list[tuple[int, int]] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Where each token's match lies roughly: the best match between tiles of tokens.

    Queries and keys are averaged over tiles of tokens, matched there, and the displacement of a tile is given to all
    its tokens. For the `center` of `corrdit.ops.soft_displacement`, as FastVMT (arXiv 2602.05551) looks
    for motion in a window round the tile's.

    Args:
        q, k: `[B, H, N, D]`.
        grid: how the N tokens are arranged.
        tile: tokens a side, at least 2 and at most the longer side of the frame; or rows and columns of a tile, each at
            least 1 and at most those of the frame.
        heads: as for `soft_displacement`; "none" keeps them apart and cannot serve here.
        frames: as for `soft_displacement`.
        scale: as for `soft_displacement`.
        backend: as for `soft_displacement`.

    Returns:
        float32 (x, y) in tokens of the key frame, `[B, F, F, h, w, 2]` or `[B, P, h, w, 2]` with `frames`.

    Raises:
        ValueError: a tile out of range, or what `hard_displacement` refuses.
    """
    rows_columns = tile_size(tile)
    if isinstance(tile, int):
        fits = tile <= max(grid.height, grid.width)
    else:
        fits = rows_columns[0] <= grid.height and rows_columns[1] <= grid.width
    if not fits:
        raise ValueError(f"a tile of {tile} tokens is larger than a frame of {grid.height} x {grid.width} tokens")
    coarse = TokenGrid(grid.frames, -(-grid.height // rows_columns[0]), -(-grid.width // rows_columns[1]))
    queries, keys = (_tile_means(tensor.detach(), grid, rows_columns) for tensor in (q, k))
    moved = ops.hard_displacement(queries, keys, coarse, heads=heads, frames=frames, scale=scale, backend=backend)
    rows = torch.arange(grid.height, device=q.device) // rows_columns[0]
    columns = torch.arange(grid.width, device=q.device) // rows_columns[1]
    spread = moved.index_select(-3, rows).index_select(-2, columns)
    own = grid.coordinates(q.device).unflatten(0, (grid.height, grid.width))
    return own + own.new_tensor(rows_columns[::-1]) * spread.to(own.dtype)


def tile_size(tile: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile.

    Raises:
        ValueError: neither a side of at least 2 tokens nor rows and columns of at least 1, of 2 tokens in all.
    """
    if not isinstance(tile, (tuple, list)):
        side = whole_number("tile", tile, 2)
        return side, side
    if len(tile) != 2:
        raise ValueError(f"tile must be tokens a side, or rows and columns, got {tile!r}")
    rows, columns = (whole_number("tile", side, 1) for side in tile)
    if rows * columns < 2:
        raise ValueError("tile is a single token; give a larger one, or leave it out")
    return rows, columns


def _tile_means(tensor: Tensor, grid: TokenGrid, tile: tuple[int, int]) -> Tensor:
    """Means over tiles of the video tokens of `[B, H, N, D]`, `[B, H, F * tiles, D]`."""
    batch, heads, _, channels = tensor.shape
    maps = tensor[:, :, grid.video_slice].reshape(-1, grid.height, grid.width, channels).movedim(-1, 1)
    dtype = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    means = functional.avg_pool2d(maps.to(dtype), tile, ceil_mode=True, count_include_pad=False)
    return means.to(tensor.dtype).movedim(1, -1).reshape(batch, heads, -1, channels)
