"""Positional embeddings as something to optimise: the absolute table, or rotary tables apart for queries and keys."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.host.attention import Attention, AttentionCall, processors_wrapped
from corrdit.integrations.diffusers.host.forwards import EarlyExit, leaving_after, watched_output
from corrdit.integrations.diffusers.layouts import TransformerLayout, config_of
from corrdit.integrations.diffusers.motion_transfer.attention_editing import (
    EditingProcessor,
    joined_with_text,
    video_part,
)


class PositionalTables(abc.ABC):
    """The positional embedding of one transformer for one size of video.

    Attributes:
        original: the model's own tables by name, float32, for the video tokens.
    """

    original: dict[str, Tensor]

    @abc.abstractmethod
    def applied(self, transformer: Module, tables: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The transformer with other tables, which gradients reach, inside the block."""


class AbsoluteTable(PositionalTables):
    """CogVideoX-2B's table added to the tokens; the rows of the text stay as they are.

    Args:
        transformer: with a `patch_embed`.
        arguments: of a forward.
        grid: of that forward.
    """

    def __init__(self, transformer: Module, arguments: Mapping[str, Tensor], grid: TokenGrid) -> None:
        embed: Any = transformer.patch_embed
        config = config_of(transformer)
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        length = (frames - 1) * config.temporal_compression_ratio + 1
        with torch.no_grad():
            if config.use_learned_positional_embeddings:
                joint = embed.pos_embedding
            else:
                # The weights themselves may be elsewhere between two forwards.
                device = arguments["hidden_states"].device
                joint = embed._get_positional_embeddings(height, width, length, device=device)
        # As the model adds it: in its own precision.
        self._table = joint[:, -grid.video_tokens :].to(embed.text_proj.weight.dtype).float()
        self._text_tokens = grid.text_tokens
        self.original = {"table": self._table.clone()}

    @contextmanager
    def applied(self, transformer: Module, tables: Mapping[str, Tensor]) -> Iterator[None]:
        def add(output: Tensor) -> Tensor:
            moved = (tables["table"].to(output.device) - self._table.to(output.device)).to(output.dtype)
            text, video = output.tensor_split([self._text_tokens], dim=1)
            return torch.cat([text, video + moved], dim=1)

        with watched_output(transformer.get_submodule("patch_embed"), add):
            yield


class RotaryTables(PositionalTables):
    """Rotary tables, one for the queries and one for the keys of all layers.

    Where the attention modules are given tables (cos, sin), the stock processors get none, and the rotation is done out
    of place where they call attention. Where they are given something else, theirs stays, and the tables are a further
    rotation behind it: cos 1 and sin 0 at first, by which any angle of theirs can be reached as well.

    Args:
        transformer: one whose attention is full.
        layout: its layout.
        arguments: of a forward.
        grid: of that forward.
    """

    def __init__(
        self, transformer: Module, layout: TransformerLayout, arguments: Mapping[str, Tensor], grid: TokenGrid
    ) -> None:
        self._layout, self._grid = layout, grid
        given, heads, width = _given_tables(transformer, layout, arguments)
        self._replaces = isinstance(given, (tuple, list)) and [isinstance(part, Tensor) for part in given] == [True] * 2
        if self._replaces:
            cos, sin = (_by_head(table.detach().float(), grid.video_tokens, heads, width) for table in given)
        else:
            cos = torch.ones(grid.video_tokens, 1, width, device=arguments["hidden_states"].device)
            sin = torch.zeros_like(cos)
        both = {"cos": cos, "sin": sin}
        self.original = {f"{role}_{part}": table.clone() for role in ("query", "key") for part, table in both.items()}

    def applied(self, transformer: Module, tables: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        halves = self._layout.rotary_halves

        def rotate(call: AttentionCall, attention: Attention) -> Tensor:
            q, k = (
                _rotated(tensor, tables[f"{role}_cos"], tables[f"{role}_sin"], self._grid, halves)
                for tensor, role in ((call.query, "query"), (call.key, "key"))
            )
            return attention(call.changed(q, k, call.value))

        modules, rotary = self._layout.attention_modules(transformer), _ignore if self._replaces else None
        return processors_wrapped(
            modules, range(len(modules)), lambda layer, inner: EditingProcessor(inner, rotate, rotary=rotary)
        )


def positional_tables(
    backbone: Backbone, transformer: Module, arguments: Mapping[str, Tensor], grid: TokenGrid
) -> PositionalTables:
    """The positional embedding of a model, whichever kind it has.

    Args:
        backbone: of the transformer.
        transformer: to be run.
        arguments: of one of its forwards, by name.
        grid: of that forward.

    Raises:
        ValueError: rotary tables that do not fit the tokens.
    """
    absolute = hasattr(getattr(transformer, "patch_embed", None), "_get_positional_embeddings")
    if absolute and not getattr(config_of(transformer), "use_rotary_positional_embeddings", False):
        return AbsoluteTable(transformer, arguments, grid)
    return RotaryTables(transformer, backbone.layout(), arguments, grid)


def _given_tables(
    transformer: Module, layout: TransformerLayout, arguments: Mapping[str, Tensor]
) -> tuple[Any, int, int]:
    """What the first attention layer is given as rotary tables, its heads and their width, from a forward that ends
    there."""
    seen: list[object] = []
    queries: list[torch.Size] = []

    def look(call: AttentionCall, attention: Attention) -> Tensor:
        queries.append(call.query.shape)
        if leave:
            raise EarlyExit
        return attention(call)

    def looking(layer: int, inner: object) -> EditingProcessor:
        return EditingProcessor(inner, look, rotary=seen.append)

    modules = layout.attention_modules(transformer)
    with torch.no_grad(), leaving_after(transformer, layout, 0) as leave, processors_wrapped(modules, (0,), looking):
        transformer(**arguments)
    _, heads, _, width = queries[0]
    return seen[0] if seen else None, heads, width


def _by_head(table: Tensor, tokens: int, heads: int, width: int) -> Tensor:
    """A family's table as `[tokens, heads or 1, D]`, each angle twice in a row."""
    if 2 * table.shape[-1] == width and table.numel() == tokens * heads * table.shape[-1]:
        # Mochi has every angle once.
        return table.reshape(tokens, heads, width // 2).repeat_interleave(2, dim=-1)
    if table.shape[-1] in (width, heads * width) and table.numel() == tokens * table.shape[-1]:
        return table.reshape(tokens, -1, width)
    raise ValueError(
        f"the model's rotary tables have shape {list(table.shape)}, which does not fit {tokens} video tokens and "
        f"{heads} heads of {width}; they cannot be optimised"
    )


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor, grid: TokenGrid, halves: int) -> Tensor:
    """`[B, H, N, D]` with its video tokens rotated pair by pair, out of place."""
    video = video_part(tensor, grid)
    # [heads or 1, tokens, D]
    cos, sin = (table.transpose(0, 1).to(video.device) for table in (cos, sin))
    wide = video.float()
    return joined_with_text((wide * cos + _turned(wide, halves) * sin).to(tensor.dtype), tensor, grid)


def _turned(wide: Tensor, halves: int) -> Tensor:
    """Every pair of channels by a quarter turn; `halves` as in `TransformerLayout.rotary_halves`."""
    if not halves:
        real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-imaginary, real], dim=-1).flatten(-2)
    real, imaginary = wide.unflatten(-1, (halves, 2, -1)).unbind(-2)
    return torch.stack([-imaginary, real], dim=-2).flatten(-3)


def _ignore(tables: object) -> None:
    """The model's own tables are not used."""
