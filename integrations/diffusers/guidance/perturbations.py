"""What a perturbed attention layer computes instead of full attention. Text keeps its attention in all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.attention_inputs import key_mask_of, part_of_layer, with_text_queries
from corrdit.integrations.diffusers.compatibility import check_attention_backend
from corrdit.integrations.diffusers.host.attention import Attention, AttentionCall, DelegatingProcessor, Interceptors

LOGITS_AT_ONCE = 2**23
"""Elements of the video-to-text logits that identity attention holds at a time (32 MiB in float32)."""

AttentionFunction = Callable[..., Tensor]
"""`attention(q, k, v, grid, *, scale, key_mask) -> [B, H, N, D]`."""


def identity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:
    """Attention in which a video token sees itself and the text only; text tokens see everything.

    Source: perturbed-attention guidance (arXiv 2403.17377), in its form for joint attention with text.

    Args:
        q, k, v: `[B, H, N, D]`, text included.
        grid: how the N tokens are arranged.
        scale: factor of q.k.
        key_mask: bool `[B, N]`, True = may be attended, or None.

    Returns:
        `[B, H, N, D]` in the dtype of the input.
    """
    video, text = grid.video_slice, grid.text_slice
    if not grid.text_tokens:
        return v.clone()
    allowed = None if key_mask is None else key_mask[:, None, None, :]
    from_text = F.scaled_dot_product_attention(q[:, :, text], k, v, attn_mask=allowed, scale=scale)
    text_allowed = None if allowed is None else allowed[..., text]
    rows = max(1, LOGITS_AT_ONCE // (q.shape[0] * q.shape[1] * (grid.text_tokens + 1)))
    parts = []
    for start in range(0, grid.video_tokens, rows):
        own_q, own_k, own_v = (tensor[:, :, video][:, :, start : start + rows] for tensor in (q, k, v))
        parts.append(_self_and_text(own_q, own_k, own_v, k[:, :, text], v[:, :, text], scale, text_allowed))
    from_video = torch.cat(parts, dim=2)
    return torch.cat([from_text, from_video] if grid.text_first else [from_video, from_text], dim=2)


def _self_and_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    scale: float,
    text_allowed: Tensor | None,
) -> Tensor:
    """Each query sees the key of its own row and the text; all `[B, H, n, D]`."""
    own = (q.float() * k.float()).sum(dim=-1, keepdim=True) if q.dtype != torch.float64 else (q * k).sum(-1, True)
    to_text = (q @ text_k.transpose(-1, -2)).to(own.dtype)
    if text_allowed is not None:
        to_text = to_text.masked_fill(~text_allowed, -torch.inf)
    weight = (torch.cat([own, to_text], dim=-1) * scale).softmax(dim=-1).to(v.dtype)
    return weight[..., :1] * v + weight[..., 1:] @ text_v


def frame_local(*, renormalize: bool, span: int, backend: str) -> AttentionFunction:
    """`corrdit.ops.frame_local_attention` with these settings."""
    return functools.partial(ops.frame_local_attention, renormalize=renormalize, span=span, backend=backend)


class SubstituteAttention:
    """An interceptor that answers attention calls with another attention.

    The processor round the call is the model's own, so projections, norms and rotary positions are too; heads that keep
    full attention have it from the model's own backend.

    Args:
        attention: what answers.
        grid: the layer's token axis, padded text included.
        heads: the heads that are perturbed, or None for all; the others keep full attention.

    Attributes:
        samples: answered so far.
    """

    def __init__(self, attention: AttentionFunction, grid: TokenGrid, heads: tuple[int, ...] | None) -> None:
        self._attention = attention
        self._grid = grid
        self._heads = heads
        self.samples = 0

    def __call__(self, call: AttentionCall, full_attention: Attention) -> Tensor:
        """The answer, `[B, H, N, D]`."""
        call = call.as_attended()
        part = part_of_layer(call.query, call.key, call.causal, self._grid)
        if part == "text":
            return full_attention(call)
        if part == "all":
            return self._answer(call, full_attention)
        whole = call.changed(with_text_queries(call.query, self._grid), call.key, call.value)
        return self._answer(whole, full_attention)[:, :, self._grid.text_tokens :]

    def _answer(self, call: AttentionCall, full_attention: Attention) -> Tensor:
        query, key, value = call.query, call.key, call.value
        batch, heads, tokens, _ = query.shape
        grid = self._grid_of(tokens, key.shape[2], call.causal)
        if key.shape[1] != heads:
            key, value = (tensor.repeat_interleave(heads // key.shape[1], dim=1) for tensor in (key, value))
        self.samples += batch
        key_mask = key_mask_of(call.mask, batch, tokens)
        if self._heads is None:
            return self._perturbed(query, key, value, grid, scale=call.scale, key_mask=key_mask)
        chosen = list(self._heads)
        others = [head for head in range(heads) if head not in self._heads]
        own = (query[:, chosen], key[:, chosen], value[:, chosen])
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        output[:, chosen] = self._perturbed(*own, grid, scale=call.scale, key_mask=key_mask)
        if others:
            rest = call.changed(query[:, others], key[:, others], value[:, others])
            if call.mask is not None and call.mask.ndim > 2 and call.mask.shape[-3] > 1:
                rest = rest.masked(call.mask[..., others, :, :])
            output[:, others] = full_attention(rest)
        return output

    def _perturbed(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, **options: object) -> Tensor:
        """The other attention, in the precision of its tensors: autocast has said which that is."""
        with torch.autocast(q.device.type, enabled=False):
            return self._attention(q, k, v, grid, **options)

    def _grid_of(self, tokens: int, keys: int, causal: bool) -> TokenGrid:
        """The grid of one call, in which a family may have dropped a sample's text padding (Mochi)."""
        text = tokens - self._grid.video_tokens
        if keys != tokens or causal or not 0 <= text <= self._grid.text_tokens:
            kind = "causal" if causal else f"of {tokens} queries and {keys} keys"
            raise ValueError(
                f"guidance needs full self-attention over {self._grid.video_tokens} video tokens and at most "
                f"{self._grid.text_tokens} text tokens, but a perturbed layer has attention {kind}; block-causal, "
                "windowed and cross-attention cannot be perturbed"
            )
        return replace(self._grid, text_tokens=text)


class PerturbingProcessor(DelegatingProcessor):
    """Drop-in attention processor whose attention is another.

    Args:
        inner: the processor it delegates to.
        attention: what answers its calls.
        grid: the layer's token axis, padded text included.
        heads: the heads that are perturbed, or None for all.
        batch: samples that go through it in a forward.

    Raises:
        ValueError: at a forward, a layer that did not put every sample through attention that can be seen.
    """

    def __init__(
        self,
        inner: object,
        attention: AttentionFunction,
        grid: TokenGrid,
        heads: tuple[int, ...] | None,
        batch: int,
    ) -> None:
        super().__init__(inner)
        self._attention, self._grid, self._heads, self._batch = attention, grid, heads, batch

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output, from the other attention."""
        substitute = SubstituteAttention(self._attention, self._grid, self._heads)
        output = self.delegated((*interceptors, substitute), attn, *args, **kwargs)
        if substitute.samples != self._batch:
            check_attention_backend(self.inner)
            raise ValueError(
                f"{type(self.inner).__name__} called scaled_dot_product_attention for {substitute.samples} of "
                f"{self._batch} samples, so its attention cannot be perturbed; use a model whose self-attention is one "
                'softmax over all tokens, with a native attention backend (transformer.set_attention_backend("native"))'
            )
        return output
