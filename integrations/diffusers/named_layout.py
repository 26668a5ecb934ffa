"""Layouts of transformers that nobody described, by what their user says of them."""

from __future__ import annotations

import warnings
from typing import Literal

from torch import nn

from corrdit.arguments import choice
from corrdit.integrations.diffusers.layouts import BlockLayout, register_layout


def register_named_grid(
    transformer_class_name: str,
    *,
    blocks: str | tuple[str, ...] = "transformer_blocks",
    attention: str = "attn1",
    axes: str = "BCFHW",
    patch_size: tuple[int, int, int] = (1, 2, 2),
    text: Literal["first", "last"] | None = None,
    guidance: Literal["batched", "separate"] = "separate",
    heads: int | None = None,
) -> type[BlockLayout]:
    """Make a transformer known to `capture` by naming its grid, where no layout of it exists.

    It warns, because nothing of what is said here can be seen in the model: `corrdit.testing.check_backbone` of
    `corrdit.testing.given_backbone(transformer, arguments)` finds out whether it is right.

    Args:
        transformer_class_name: of the transformer or a base class.
        blocks: names of its lists of blocks, in the order they run.
        attention: name of the self-attention module in a block; it has to hold a diffusers attention processor.
        axes: of its `hidden_states` in their order: batch B, channels C, frames F, height H and width W.
        patch_size: (frames, rows, columns) of latents that one token stands for.
        text: where `encoder_hidden_states` stand in the token axis of self-attention; None for not there.
        guidance: whether both branches come in one call ("batched", the unconditional first) or in two.
        heads: attention heads; None where the config says `num_attention_heads`.

    Returns:
        The layout, to be made better in a subclass.

    Raises:
        ValueError: axes that are not a permutation of BCFHW, or another word for text or guidance.
    """
    if sorted(axes) != sorted("BCFHW"):
        raise ValueError(f"axes must hold each of B, C, F, H and W once, got {axes!r}")
    if text is not None:
        choice("text", text, ("first", "last"))
    choice("guidance", guidance, ("batched", "separate"))
    said = {
        "family": transformer_class_name,
        "transformers": (transformer_class_name,),
        "lists": (blocks,) if isinstance(blocks, str) else tuple(blocks),
        "attention": attention,
        "axes": axes,
        "text": text,
        "guidance": guidance,
    }
    layout = type(f"{transformer_class_name}Layout", (_NamedLayout,), {**said, "named": (patch_size, heads)})
    warnings.warn(
        f"the token grid of {transformer_class_name} is taken as it was named; check it with "
        "corrdit.testing.check_backbone(corrdit.testing.given_backbone(transformer, arguments))",
        UserWarning,
        stacklevel=2,
    )
    register_layout(transformer_class_name, layout)
    return layout


class _NamedLayout(BlockLayout):
    named: tuple[tuple[int, int, int], int | None]

    def patch_size(self, transformer: nn.Module) -> tuple[int, int, int]:
        return self.named[0]

    def heads(self, transformer: nn.Module) -> int:
        heads = self.named[1]
        return super().heads(transformer) if heads is None else heads
