"""Attention without its cross-frame part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, overload

from torch import Tensor

from corrdit.arguments import flag, whole_number
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend


@overload
def frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    renormalize: bool = True,
    span: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor: ...


@overload
def frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    renormalize: bool = True,
    span: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor]: ...


def frame_local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    renormalize: bool = True,
    span: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    queries: tuple[int, int] | None = None,
    query_frames: Iterable[int] | None = None,
    keys: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which a video token sees the text and its own frame only; text tokens see everything.

    Source: DiffTrack (arXiv 2506.17220), cross-attention guidance, perturbed branch.

    Args:
        q, k, v: `[B, H, N, D]` float16, bfloat16, float32 or float64, text tokens included.
        grid: how the N tokens are arranged.
        renormalize: True removes the cross-frame keys before the softmax; False takes the softmax over all keys and
            drops the cross-frame weights after it (DiffTrack's released code with classifier-free guidance).
        span: frames `|i - j| <= span` count as a token's own.
        scale: factor of q.k, `D ** -0.5` by default.
        key_mask: bool `[B, N]`, True = may be attended. A token without any key gets 0.
        queries, query_frames, keys: what q, k and v hold if not the whole axis, and fewer heads of k and v; see
            `corrdit.ops`. The text takes part where they hold it.
        return_lse: whether to return the logarithm of what each softmax divides by too; -inf for a token without keys.
        backend: "auto", "triton", "streaming" or "reference".
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        `[B, H, N, D]` in the shape and dtype of q; with `return_lse` a pair of it and the log-sum-exp `[B, H, N]`,
        float32 (float64 for float64 input). Differentiable in q, k and v, once.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    if v is None:
        raise ValueError("v must be a tensor [batch, heads, tokens, head_dim], got None")
    problem = checks.checked_problem(
        q, k, v, grid, scale=scale, key_mask=key_mask, queries=queries, query_frames=query_frames, keys=keys,
        return_lse=return_lse, memory_budget=memory_budget,
    )  # fmt: skip
    with full_precision(q):
        attended, lse = select_backend(backend, q, problem).frame_local_attention(
            q,
            k,
            v,
            problem,
            renormalize=flag("renormalize", renormalize),
            span=min(whole_number("span", span, 0), grid.frames),
        )
    return attended if lse is None else (attended, lse)
