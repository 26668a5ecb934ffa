"""Attention of chosen tokens on the text and on every frame, in chunks of attention rows."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.streaming.budget import keys_in_a_segment, rows_in_a_chunk
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.products import HeadProducts


@torch.no_grad()
def attention_mass(
    q: Tensor,
    k: Tensor,
    grid: TokenGrid,
    tokens: Tensor,
    *,
    source: int,
    heads: str,
    weights: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, frames, text_peak, frame_peak); see `corrdit.ops.attention_mass`."""
    products = HeadProducts(q, heads, weights)
    together = products.maps if products.averaged else 1
    size = products.element_bytes
    key_bytes = 2 * products.copied_width * size
    segment = keys_in_a_segment(memory_budget, key_bytes, grid.tokens)
    rows = rows_in_a_chunk(
        memory_budget,
        fixed_bytes=segment * key_bytes + grid.tokens,
        row_bytes=(grid.tokens * (1 + products.averaged) + 4 * q.shape[1] * q.shape[3] + 4 * grid.frames + 16) * size,
        tile_row_bytes=grid.tokens * size,
        rows=tokens.numel(),
        device=q.device,
        purpose="attention mass",
    )
    shape = (q.shape[0], products.maps // together, tokens.numel())
    text, text_peak = (torch.zeros(shape, dtype=products.dtype, device=q.device) for _ in range(2))
    frames, frame_peak = (torch.zeros((*shape, grid.frames), dtype=products.dtype, device=q.device) for _ in range(2))
    rows_of_maps = _AttentionRows(products, grid, rows, segment, scale, q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            removed = None if key_mask is None else ~key_mask[batch]
            for number in range(shape[1]):
                maps = range(number * together, (number + 1) * together)
                for start in range(0, tokens.numel(), rows):
                    part = slice(start, start + rows)
                    chosen = tokens[part] + grid.frame_slice(source).start
                    attention = rows_of_maps.average(q[batch][:, chosen], k[batch], maps, removed)
                    place = (batch, number, part)
                    by_frame = attention[:, grid.video_slice].unflatten(-1, (grid.frames, grid.tokens_per_frame))
                    frames[place], frame_peak[place] = by_frame.sum(-1), by_frame.amax(-1)
                    if grid.text_tokens:
                        of_text = attention[:, grid.text_slice]
                        text[place], text_peak[place] = of_text.sum(-1), of_text.amax(-1)
    if heads == "none":
        return text, frames, text_peak, frame_peak
    return text.squeeze(1), frames.squeeze(1), text_peak.squeeze(1), frame_peak.squeeze(1)


class _AttentionRows:
    """Rows of the softmax over all tokens; keys are read `segment` at a time."""

    def __init__(
        self, products: HeadProducts, grid: TokenGrid, rows: int, segment: int, scale: float, device: torch.device
    ) -> None:
        self.products, self.segment, self.scale = products, segment, scale
        shape = (1 + products.averaged, rows, grid.tokens)
        self._buffers = torch.empty(shape, dtype=products.dtype, device=device)

    def average(self, queries: Tensor, k: Tensor, maps: range, removed: Tensor | None) -> Tensor:
        """`[n, N]` attention of queries `[H, n, D]`, averaged over the maps, in a buffer."""
        result = self._buffers[0, : queries.shape[1]]
        for index in maps:
            scores = self._buffers[-1, : queries.shape[1]] if index > maps.start else result
            exponentials, factor = self._softmax(queries, k, index, removed, scores)
            if index == maps.start:
                result.mul_(factor)
            else:
                result.addcmul_(exponentials, factor)
        return result

    def _softmax(
        self, queries: Tensor, k: Tensor, index: int, removed: Tensor | None, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exponentials `[n, N]` of one map, made in `scores`, and what to multiply their rows by `[n, 1]`."""
        products = self.products
        matrix = products.queries(products.heads_of(queries, index))
        for start in range(0, k.shape[1], self.segment):
            part = slice(start, start + self.segment)
            keys = products.keys(products.heads_of(k, index)[:, part])
            place = scores[:, part]
            torch.addmm(place, matrix, keys.t(), beta=0, alpha=self.scale * LOG2_E, out=place)
        if removed is not None:
            scores.masked_fill_(removed, float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        if removed is not None:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        exponentials = scores.sub_(largest).exp2_()
        sums = exponentials.sum(-1, keepdim=True)
        return exponentials, torch.where(sums == 0, 0.0, products.map_weights[index] / sums)
