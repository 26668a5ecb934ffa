"""`torch.compile` of the reference, and FlexAttention with the coordinates as values.

The reference goes over frame pairs in a Python loop, which the compiler would unroll into hundreds of copies: its body
for one pair is compiled instead and called for each. Frames are all alike, so it is compiled once.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from corrdit import reference
from corrdit.benchmark.baselines import folded_chunks
from corrdit.benchmark.baselines.sdpa import positions_as_values
from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem, TokenAxis

# Shapes, passes and operations of one run, each compiled for its own: more than the eight that the compiler allows.
RECOMPILATIONS = 256


P = ParamSpec("P")
R = TypeVar("R")


def _compile(function: Callable[P, R], mode: str = "default") -> Callable[P, R]:
    """Compiled for each shape by itself; where that cannot be done it raises instead of running the plain function."""
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


@functools.cache
def _compiled_reference(name: str) -> Callable[..., Any]:
    return _compile(getattr(reference, name))


def _problem(q: Tensor, grid: TokenGrid, heads: str = "none", temperature: float = 1.0) -> PairProblem:
    axis = TokenAxis.of_grid(grid)
    weights = torch.full((q.shape[1],), 1 / q.shape[1], device=q.device)
    return PairProblem(grid, axis, axis, temperature * q.shape[-1] ** -0.5, heads=heads, weights=weights)


def _two_frames(tensor: Tensor, grid: TokenGrid, first: int, second: int) -> Tensor:
    return torch.cat((tensor[:, :, grid.frame_slice(first)], tensor[:, :, grid.frame_slice(second)]), dim=2)


def _by_pair(
    name: str, q: Tensor, k: Tensor, grid: TokenGrid, heads: str, window: int | None, temperature: float = 1.0
) -> Tensor:
    """`[B, F, F, h, w, 2]` from the compiled displacement of one pair of frames."""
    own = TokenGrid(1, grid.height, grid.width)
    problem = replace(_problem(q, own, heads, temperature), pairs=[(0, 0)], window=window)
    moved = [
        _compiled_reference(name)(q[:, :, grid.frame_slice(i)], k[:, :, grid.frame_slice(j)], problem)
        for i in range(grid.frames)
        for j in range(grid.frames)
    ]
    rows = [found[0] if isinstance(found, tuple) else found for found in moved]
    return torch.cat(rows, dim=1).unflatten(1, (grid.frames, grid.frames)).unflatten(-2, (grid.height, grid.width))


def soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, heads: str = "logits", window: int | None = None, temperature: float = 1.0
) -> Tensor:
    """The materialising reference under `torch.compile`: `[B, F, F, h, w, 2]`."""
    return _by_pair("soft_displacement", q, k, grid, heads, window, temperature)


@functools.cache
def _compiled_chunk(mode: str) -> Callable[..., Tensor]:
    return _compile(folded_chunks.expected_positions, mode)


def folded_soft_displacement(q: Tensor, k: Tensor, grid: TokenGrid, *, mode: str) -> Tensor:
    """`folded_chunks.soft_displacement` with its chunk compiled in a mode of `torch.compile`."""
    return folded_chunks.soft_displacement(q, k, grid, chunk=_compiled_chunk(mode))


def hard_displacement(q: Tensor, k: Tensor, grid: TokenGrid) -> Tensor:
    """The same with the argmax: int64 `[B, F, F, h, w, 2]`."""
    return _by_pair("hard_displacement", q, k, grid, "logits", None)


def match(q: Tensor, k: Tensor, grid: TokenGrid, *, bidirectional: bool = True) -> tuple[Tensor, Tensor]:
    """Frame 0 in every other frame: xy `[B, F - 1, h, w, 2]` and score `[B, F - 1, h, w]`."""
    two = TokenGrid(2, grid.height, grid.width)
    problem = replace(_problem(q, two, "probabilities"), pairs=[(0, 1)])
    found = [
        _compiled_reference("match")(
            *(_two_frames(t, grid, 0, target) for t in (q, k)), problem, bidirectional=bidirectional, refine=0
        )
        for target in range(1, grid.frames)
    ]
    xy, score = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return xy.unflatten(-2, (grid.height, grid.width)), score.unflatten(-1, (grid.height, grid.width))


def cost_rows(q: Tensor, k: Tensor, grid: TokenGrid, tokens: Tensor) -> Tensor:
    """Cost maps of tokens of frame 0: `[B, P, F, h, w]`."""
    two = TokenGrid(2, grid.height, grid.width)
    problem = replace(_problem(q, two, "probabilities"), pairs=[(0, 1)])
    rows = [
        _compiled_reference("cost_rows")(
            *(_two_frames(t, grid, 0, target) for t in (q, k)), problem, tokens, bidirectional=True
        )
        for target in range(grid.frames)
    ]
    return torch.cat([both.squeeze(1) for both in rows], dim=2).unflatten(-1, (grid.height, grid.width))


def attention_mass(q: Tensor, k: Tensor, grid: TokenGrid, tokens: Tensor) -> tuple[Tensor, ...]:
    """Attention of tokens of frame 0; takes text tokens."""
    mass: tuple[Tensor, ...] = _compiled_reference("attention_mass")(
        q, k, _problem(q, grid, "probabilities"), tokens, source=0
    )
    return tuple(part.squeeze(1) for part in mass)


def frame_local_attention(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, *, renormalize: bool = True) -> Tensor:
    """The whole map under `torch.compile`; takes text tokens."""
    attended: Tensor = _compiled_reference("frame_local_attention")(
        q, k, v, _problem(q, grid), renormalize=renormalize, span=0
    )[0]
    return attended


def installed(module: str) -> bool:
    """Whether a module can be imported, without its being so."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or something else stands for it
        return False


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return _compile(flex_attention)


FLASH = {"BACKEND": "FLASH"}
"""Kernel options of FlexAttention by which it takes FlashAttention's kernels in place of its own."""


def flash_missing() -> str | None:
    """Why FlexAttention cannot take `FLASH` here."""
    from torch.nn.attention import flex_attention

    if "BACKEND" not in getattr(flex_attention, "FlexKernelOptions", type).__annotations__:
        return f"FlexAttention of torch {torch.__version__} has no BACKEND"
    if not installed("flash_attn.cute"):
        return "flash_attn.cute is not installed"
    return None


def flex_soft_displacement(
    q: Tensor, k: Tensor, grid: TokenGrid, *, temperature: float = 1.0, options: dict[str, str] | None = None
) -> Tensor:
    """heads="probabilities" by FlexAttention: `[B, F, F, h, w, 2]`; values 16 wide, as wide as keys for `FLASH`."""
    scale = temperature * q.shape[-1] ** -0.5
    attend = functools.partial(_compiled_flex_attention(), scale=scale, kernel_options=options)
    return positions_as_values(attend, q, k, grid, width=16 if options is None else q.shape[-1], contiguous=True)


@functools.lru_cache(maxsize=4)
def _same_frame_mask(grid: TokenGrid, device: torch.device) -> object:
    from torch.nn.attention.flex_attention import create_block_mask

    first, last = grid.video_slice.start, grid.video_slice.stop
    tokens = grid.tokens_per_frame

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        text = (query < first) | (query >= last) | (key < first) | (key >= last)
        return text | ((query - first) // tokens == (key - first) // tokens)

    # Compiled on a GPU, where a map of all pairs of a long video would not fit.
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(seen, None, None, grid.tokens, grid.tokens, device=device)


def flex_frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    renormalize: bool = True,
    options: dict[str, str] | None = None,
) -> Tensor:
    """Frame-local attention by FlexAttention with a block mask; takes text tokens.

    Zeroing after the softmax is masking before it, times the share of the kept keys in the full softmax sum; that sum
    is read off a second attention over all keys, whose values are 16 wide and not used.
    """
    mask = _same_frame_mask(grid, q.device)
    if renormalize:
        masked: Tensor = _compiled_flex_attention()(q, k, v, block_mask=mask, kernel_options=options)
        return masked
    from torch.nn.attention.flex_attention import AuxRequest

    sums = AuxRequest(lse=True)
    kept, near = _compiled_flex_attention()(q, k, v, block_mask=mask, return_aux=sums)
    _, everything = _compiled_flex_attention()(q, k, v[..., :16].detach().contiguous(), return_aux=sums)
    zeroed: Tensor = kept * (near.lse - everything.lse).exp().unsqueeze(-1).to(kept.dtype)
    return zeroed
