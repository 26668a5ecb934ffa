"""Attention without its cross-frame part."""

from __future__ import annotations

from torch import Tensor

from corrdit.arguments import flag, whole_number
from corrdit.grid import TokenGrid
from corrdit.ops import checks
from corrdit.ops.backends import full_precision, select_backend


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
    backend: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
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
        backend: "auto", "triton", "streaming" or "reference".
        memory_budget: bytes beyond inputs and outputs (streaming).

    Returns:
        `[B, H, N, D]` in the dtype of the input. Differentiable in q, k and v, once.

    Raises:
        ValueError: an argument is out of range or does not fit the grid.
        RuntimeError: the backend asked for cannot run here.
    """
    checks.check_tokens(grid, q=q, k=k, v=v)
    with full_precision(q):
        attended: Tensor = select_backend(backend, q).frame_local_attention(
            q,
            k,
            v,
            grid,
            scale=checks.check_scale(scale, q.shape[-1]),
            key_mask=checks.check_key_mask(key_mask, q),
            renormalize=flag("renormalize", renormalize),
            span=min(whole_number("span", span, 0), grid.frames),
            memory_budget=checks.check_budget(memory_budget),
        )
    return attended
