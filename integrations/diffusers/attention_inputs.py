"""What a call of attention holds, joined over the calls of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.host.attention import AttentionCall
from corrdit.integrations.diffusers.host.parallel import gathered

ADDITIVE_MASK_LIMIT = -1000.0
"""Additive masks at or below this remove a key: diffusers writes -10000 or the type's lowest value."""


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and keys of one attention call.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        mask: attn_mask as it was given, or None.
        causal: whether the call asked for a causal mask.
        key_mask: bool `[B, N]`, True where a key may be attended; set once the calls of a layer are joined.
        keys_spread: whether this process has a part of the keys only, where tokens are spread over several.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = False
    key_mask: torch.Tensor | None = None
    keys_spread: bool = False

    @classmethod
    def of_call(cls, call: AttentionCall) -> AttentionInputs:
        """What of a call is read."""
        attended = call.as_attended()
        spread = call.kwargs.get("parallel_config") is not None
        return cls(attended.query, attended.key, call.mask, call.causal, keys_spread=spread)

    def whole(self, group: ProcessGroup | None) -> AttentionInputs:
        """Those of all tokens, without gradients, where they are spread over the processes of a group.

        Raises:
            ValueError: a mask that is not over keys alone.
        """
        if group is None:
            return self
        query = gathered(self.query, group, 2)
        if not self.keys_spread:
            return replace(self, query=query)
        mask = self.mask
        if mask is not None:
            if mask.ndim > 1 and mask.shape[-2] > 1:
                raise ValueError("the model's attention mask is not over keys alone, so it cannot be joined from parts")
            mask = gathered(mask, group, -1)
        return replace(self, query=query, key=gathered(self.key, group, 2), mask=mask, keys_spread=False)

    def over_all_tokens(self, grid: TokenGrid | CrossGrid) -> AttentionInputs | None:
        """With a query for every token: of text that attends to itself alone they are zeros; None for its own call."""
        part = part_of_layer(self.query, self.key, self.causal, grid)
        if part == "text":
            return None
        if part == "all" or not isinstance(grid, TokenGrid):
            return self
        return replace(self, query=with_text_queries(self.query, grid))


def part_of_layer(
    query: torch.Tensor, key: torch.Tensor, causal: bool, grid: TokenGrid | CrossGrid
) -> Literal["all", "text", "video"]:
    """Whose queries a call of attention has, by their number.

    As a rule those of all tokens. Where the text, which stands first, attends causally to itself alone (Cosmos 3), a
    layer has a call for it, and one for the video, whose keys are those of both.
    """
    if not isinstance(grid, TokenGrid) or not grid.text_tokens or not grid.text_first:
        return "all"
    queries, keys = query.shape[2], key.shape[2]
    if causal and queries == keys == grid.text_tokens:
        return "text"
    return "video" if (queries, keys) == (grid.video_tokens, grid.tokens) else "all"


def with_text_queries(query: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Queries of the video with zeros before them where a grid has its text."""
    return F.pad(query, (0, 0, grid.tokens - query.shape[2], 0))


class GatheredCalls:
    """Joins the attention calls of one layer: one for the whole batch, or one for each sample with padding dropped.

    Args:
        batch: samples in the layer's input.
        grid: the layer's token axis, padded text included.
        text_mask: `[B, T]`, True for the text tokens that take part, where the family may drop the others.
    """

    def __init__(self, batch: int, grid: TokenGrid, *, text_mask: torch.Tensor | None = None) -> None:
        self.batch = batch
        self.samples = 0
        self._grid = grid
        self._text_mask = text_mask
        self._calls: list[AttentionInputs] = []

    @property
    def complete(self) -> bool:
        """Whether every sample of the batch has been seen."""
        return self.samples == self.batch

    def add(self, inputs: AttentionInputs) -> bool:
        """Take one call; True when it was the last of the layer.

        Raises:
            ValueError: not self-attention, or a token count that is not the grid's.
        """
        if self.complete:
            return False
        tokens, keys = inputs.query.shape[2], inputs.key.shape[2]
        if tokens != keys:
            raise ValueError(
                f"this attention has {tokens} queries and {keys} keys, so it is cross-attention; put the processor on "
                "the self-attention module (attn1 in most families)"
            )
        if inputs.causal:
            raise ValueError("this attention is causal; correspondence is read from full attention only")
        grid = self._grid
        expected = grid.tokens
        if tokens != expected and self._text_mask is not None and self._text_mask.shape[1] == grid.text_tokens:
            expected = grid.video_tokens + int(self._text_mask[self.samples].sum())
        if tokens != expected:
            raise ValueError(
                f"the attention has {tokens} tokens but the grid has {expected} ({expected - grid.video_tokens} text + "
                f"{grid.frames} frames of {grid.height} x {grid.width}); give the TokenGrid of this model and video "
                "size"
            )
        self._calls.append(inputs)
        self.samples += inputs.query.shape[0]
        return self.complete

    def joined(self) -> AttentionInputs:
        """All samples as one `[B, H, N, D]` query and key with a key mask; the gathered calls are let go.

        Keys `k` with fewer heads than `q` (grouped-query attention) are repeated.
        """
        calls, self._calls = self._calls, []
        tokens = self._grid.tokens
        lengths = [inputs.query.shape[2] for inputs in calls]
        if len(calls) == 1 and lengths[0] == tokens:
            key_mask = key_mask_of(calls[0].mask, self.batch, tokens)
            return AttentionInputs(calls[0].query, _repeated_heads(calls[0]), key_mask=key_mask)
        device = calls[0].query.device
        masks = [
            (torch.arange(tokens, device=device) < length).expand(inputs.query.shape[0], tokens)
            for inputs, length in zip(calls, lengths, strict=True)
        ]

        def padded(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
            return torch.cat([F.pad(tensor, (0, 0, 0, tokens - tensor.shape[2])) for tensor in tensors])

        query, key = padded(inputs.query for inputs in calls), padded(map(_repeated_heads, calls))
        return AttentionInputs(query, key, key_mask=torch.cat(masks))


class CrossCalls:
    """Finds the call of attention to the text among those of one layer, which may attend to a picture, too.

    Where picture and text are the keys of one call (Wan 2.1 without projections of its own for the picture), the text
    is behind.

    Args:
        batch: samples in the layer's input.
        grid: the layer's token axes.
    """

    def __init__(self, batch: int, grid: CrossGrid) -> None:
        self.batch, self._grid = batch, grid
        self.samples = 0
        self._found: AttentionInputs | None = None

    @property
    def complete(self) -> bool:
        """Whether the call has been seen."""
        return self.samples == self.batch

    def add(self, inputs: AttentionInputs) -> bool:
        """Take one call; True when it was that to the text.

        Raises:
            ValueError: queries that are not those of the grid.
        """
        if self.complete or inputs.key.shape[2] < self._grid.keys:
            return False
        tokens = inputs.query.shape[2]
        if tokens != self._grid.video_tokens:
            raise ValueError(
                f"this attention to the text has {tokens} queries and the grid {self._grid.video_tokens} "
                f"({self._grid.frames} frames of {self._grid.height} x {self._grid.width})"
            )
        self._found, self.samples = inputs, inputs.query.shape[0]
        return self.complete

    def joined(self) -> AttentionInputs:
        """Queries of the video, keys of the text, and a key mask."""
        inputs, self._found = self._found, None
        assert inputs is not None
        keys = self._grid.keys
        mask = key_mask_of(inputs.mask, self.batch, inputs.key.shape[2])
        return AttentionInputs(
            inputs.query, _repeated_heads(inputs)[:, :, -keys:], key_mask=None if mask is None else mask[:, -keys:]
        )


def calls_of_layer(
    batch: int, grid: TokenGrid | CrossGrid, text_mask: torch.Tensor | None
) -> GatheredCalls | CrossCalls:
    """What joins the calls of one layer, by the grid of what is read from it."""
    if isinstance(grid, CrossGrid):
        return CrossCalls(batch, grid)
    return GatheredCalls(batch, grid, text_mask=text_mask)


def key_mask_of(mask: torch.Tensor | None, batch: int, tokens: int) -> torch.Tensor | None:
    """The keys an attention mask leaves, bool `[B, N]`.

    Args:
        mask: attn_mask of scaled_dot_product_attention, bool (True = attend) or additive, broadcastable to
            `[B, H, N, N]`.
        batch: B.
        tokens: N.

    Raises:
        ValueError: a mask that is not the same for all queries (of valid tokens) and heads.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        removed = mask <= ADDITIVE_MASK_LIMIT
        if bool(((mask != 0) & ~removed).any()):
            raise ValueError(
                "the model adds an attention bias that is not a plain key mask; correspondence cannot be read from it"
            )
        mask = ~removed
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape))
    keys = mask.any(dim=-2).any(dim=-2).expand(batch, tokens)
    if mask.shape[-2] == 1 and mask.shape[1] == 1:
        return keys
    between_valid = keys[:, None, :, None] & keys[:, None, None, :]
    for_all_queries = keys[:, None, None, :].expand_as(between_valid)
    if not any(bool((mask == expected).all()) for expected in (between_valid, for_all_queries)):
        raise ValueError(
            f"the model's attention mask of shape {tuple(mask.shape)} differs between queries or heads, so it is not a "
            "key mask; block-causal and windowed attention are not supported"
        )
    return keys


def _repeated_heads(inputs: AttentionInputs) -> torch.Tensor:
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    return inputs.key if groups == 1 else inputs.key.repeat_interleave(groups, dim=1)
