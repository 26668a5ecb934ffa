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
                joint = embed._get_positional_embeddings(height, width, length, device=embed.text_proj.weight.device)
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

    The stock processors are given none, and the rotation is done out of place where they call attention.

    Args:
        transformer: one whose attention modules are given rotary tables.
        layout: its layout.
        arguments: of a forward.
        grid: of that forward.
    """

    def __init__(
        self, transformer: Module, layout: TransformerLayout, arguments: Mapping[str, Tensor], grid: TokenGrid
    ) -> None:
        self._layout, self._grid = layout, grid
        cos, sin = _given_tables(transformer, layout, arguments, grid)
        both = {"cos": cos, "sin": sin}
        self.original = {f"{role}_{part}": table.clone() for role in ("query", "key") for part, table in both.items()}

    def applied(self, transformer: Module, tables: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        def rotate(call: AttentionCall, attention: Attention) -> Tensor:
            q, k = (
                _rotated(tensor, tables[f"{role}_cos"], tables[f"{role}_sin"], self._grid)
                for tensor, role in ((call.query, "query"), (call.key, "key"))
            )
            return attention(call.changed(q, k, call.value))

        modules = self._layout.attention_modules(transformer)
        return processors_wrapped(
            modules, range(len(modules)), lambda layer, inner: EditingProcessor(inner, rotate, rotary=_ignore)
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
        ValueError: a model without a positional embedding that can be given to its attention.
    """
    absolute = hasattr(getattr(transformer, "patch_embed", None), "_get_positional_embeddings")
    if absolute and not getattr(config_of(transformer), "use_rotary_positional_embeddings", False):
        return AbsoluteTable(transformer, arguments, grid)
    return RotaryTables(transformer, backbone.layout(), arguments, grid)


def _given_tables(
    transformer: Module, layout: TransformerLayout, arguments: Mapping[str, Tensor], grid: TokenGrid
) -> tuple[Tensor, Tensor]:
    """The (cos, sin) tables the first attention layer is given, seen in a forward that ends there.

    Returns:
        float32 `[tokens, heads or 1, D]` each.
    """
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
    if not seen or not isinstance(seen[0], (tuple, list)) or len(seen[0]) != 2:
        raise ValueError(
            f"the attention of {type(transformer).__name__} is given no rotary tables (cos, sin), so there is no "
            'positional embedding to optimise; take optimise="latent"'
        )
    _, heads, _, width = queries[0]
    cos, sin = (_by_head(table.detach().float(), grid.video_tokens, heads, width) for table in seen[0])
    return cos, sin


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


def _rotated(tensor: Tensor, cos: Tensor, sin: Tensor, grid: TokenGrid) -> Tensor:
    """`[B, H, N, D]` with its video tokens rotated pair by pair, out of place."""
    video = video_part(tensor, grid)
    # [heads or 1, tokens, D]
    cos, sin = (table.transpose(0, 1).to(video.device) for table in (cos, sin))
    wide = video.float()
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return joined_with_text((wide * cos + turned * sin).to(tensor.dtype), tensor, grid)


def _ignore(tables: object) -> None:
    """The model's own tables are not used."""
