"""Attention from a video to its text: where it is read, and the operations that read it.

Families with cross-attention have a module for it. In those whose text lies in the token axis of self-attention it is
the part from the video's queries to the text's keys; an operation is given that part alone, so that a softmax over its
keys is the model's, renormalised over the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from corrdit.arguments import choice, resolved_index, whole_indices
from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.layouts import Arguments, ForwardCall, TransformerLayout
from corrdit.integrations.diffusers.processors import Operation
from corrdit.motion.word_attention import weights_on_text


class TextAttention:
    """How the attention of a family's video to its text is read.

    Args:
        layout: of the family.
    """

    def __init__(self, layout: TransformerLayout) -> None:
        self._layout = layout

    def modules(self, transformer: nn.Module) -> list[nn.Module]:
        """The attention modules it is read from, one beside each self-attention module."""
        if self._layout.text is not None:
            return self._layout.attention_modules(transformer)
        return self._layout.cross_attention_modules(transformer)

    def operations(self, operations: Mapping[str, Operation]) -> dict[str, Operation]:
        """The operations, given the video's queries and the text's keys alone."""
        joint = self._layout.text is not None
        return {name: of_text(operation) if joint else operation for name, operation in operations.items()}

    def grid(self, call: ForwardCall, arguments: Arguments) -> TokenGrid | CrossGrid:
        """What a layer is read with in a call."""
        if self._layout.text is not None:
            return call.grid
        tokens = arguments["encoder_hidden_states"].shape[-2]
        return CrossGrid(call.grid.frames, call.grid.height, call.grid.width, int(tokens))


def of_text(operation: Operation) -> Operation:
    """An operation on the video's queries and the text's keys, as one on all of joint attention."""

    def read(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> object:
        cross = CrossGrid(grid.frames, grid.height, grid.width, grid.text_tokens)
        mask = None if key_mask is None else key_mask[:, grid.text_slice]
        return operation(q[:, :, grid.video_slice], k[:, :, grid.text_slice], cross, mask)

    return read


HEADS = ("mean", "none")


@torch.no_grad()
def text_maps(
    q: Tensor,
    k: Tensor,
    grid: CrossGrid,
    key_mask: Tensor | None = None,
    *,
    tokens: Sequence[int] | None = None,
    heads: str = "mean",
    scale: float | None = None,
) -> Tensor:
    """How much each place of a video attends to words, as maps over its frames: an operation for `attention="cross"`.

    ```python
    with capture(pipe, layers=[10], steps=[-1], attention="cross", operation=text_maps) as captured:
        pipe("a red disc moves left")
    captured[49, 10]  # [B, T, F, h, w]
    ```

    Args:
        q: `[B, H, F * S, D]`, of the video.
        k: `[B, H, T, D]`, of the text, or fewer heads (query head i reads key head `i // (H // Hk)`).
        grid: of both.
        key_mask: bool `[B, T]`, True for the tokens that take part.
        tokens: text tokens wanted; None for all, padding included.
        heads: "mean" over heads, or "none" for each.
        scale: factor of q.k; None for D**-0.5.

    Returns:
        Softmax over the text, float32 `[B, tokens, F, h, w]`, or `[B, H, tokens, F, h, w]` for "none".

    Raises:
        ValueError: sizes that are not the grid's, tokens that the text does not have, or another word for heads.
    """
    choice("heads", heads, HEADS)
    for name, tensor, wanted, what in (("q", q, grid.video_tokens, "video"), ("k", k, grid.keys, "text")):
        if tensor.ndim != 4 or tensor.shape[2] != wanted:
            got = tensor.shape[2] if tensor.ndim == 4 else f"the shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} must have the grid's {wanted} {what} tokens, got {got}")
    chosen = list(range(grid.keys)) if tokens is None else whole_indices("tokens", tokens)
    chosen = [resolved_index("tokens", token, grid.keys, f"a text of {grid.keys} tokens") for token in chosen]
    group = q.shape[1] // k.shape[1]
    mask = None if key_mask is None else key_mask[:, None]
    maps = []
    # A head at a time, because a text of 512 tokens makes every map 512 times as large as the video.
    for head in range(q.shape[1]):
        weights = weights_on_text(q[:, head], k[:, head // group], mask, scale)
        maps.append(weights[..., chosen].transpose(1, 2).float())
    stacked = torch.stack(maps, dim=1) if heads == "none" else sum(maps[1:], maps[0]) / len(maps)
    return stacked.unflatten(-1, (grid.frames, grid.height, grid.width))
