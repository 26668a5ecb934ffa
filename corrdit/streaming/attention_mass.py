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
    key_bytes = 2 * products.width * size
    segment = keys_in_a_segment(memory_budget, key_bytes, grid.tokens)
    rows = rows_in_a_chunk(
        memory_budget,
        fixed_bytes=segment * key_bytes + grid.tokens,
        row_bytes=(grid.tokens * (1 + products.averaged) + products.width + 8) * size,
        tile_row_bytes=grid.tokens * size,
        rows=tokens.numel(),
        device=q.device,
        purpose="attention mass",
    )
    shape = (q.shape[0], products.maps // together, tokens.numel())
    text, text_peak = (torch.zeros(shape, dtype=products.dtype, device=q.device) for _ in range(2))
    frames, frame_peak = (torch.zeros((*shape, grid.frames), dtype=products.dtype, device=q.device) for _ in range(2))
    source_start = grid.frame_slice(source).start
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            removed = None if key_mask is None else ~key_mask[batch]
            for number in range(shape[1]):
                maps = range(number * together, (number + 1) * together)
                for start in range(0, tokens.numel(), rows):
                    part = slice(start, start + rows)
                    attention = _attention_rows(
                        q[batch], k[batch], products, maps, tokens[part] + source_start, removed, scale, segment
                    )
                    place = (batch, number, part)
                    by_frame = attention[:, grid.video_slice].unflatten(-1, (grid.frames, grid.tokens_per_frame))
                    frames[place], frame_peak[place] = by_frame.sum(-1), by_frame.amax(-1)
                    if grid.text_tokens:
                        of_text = attention[:, grid.text_slice]
                        text[place], text_peak[place] = of_text.sum(-1), of_text.amax(-1)
    results = (text, frames, text_peak, frame_peak)
    return results if heads == "none" else tuple(result.squeeze(1) for result in results)  # type: ignore[return-value]


def _attention_rows(
    q: Tensor,
    k: Tensor,
    products: HeadProducts,
    maps: range,
    tokens: Tensor,
    removed: Tensor | None,
    scale: float,
    segment: int,
) -> Tensor:
    """`[n, N]` softmax over all tokens, averaged over the maps; keys are read `segment` at a time."""
    average = None
    for index in maps:
        queries = products.queries(products.heads_of(q, index)[:, tokens])
        scores = torch.empty((len(tokens), k.shape[1]), dtype=products.dtype, device=k.device)
        for start in range(0, k.shape[1], segment):
            part = slice(start, start + segment)
            keys = products.keys(products.heads_of(k, index)[:, part])
            torch.addmm(scores[:, part], queries, keys.t(), beta=0, alpha=scale * LOG2_E, out=scores[:, part])
        if removed is not None:
            scores.masked_fill_(removed, float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        if removed is not None:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        exponentials = scores.sub_(largest).exp2_()
        sums = exponentials.sum(-1, keepdim=True)
        factor = torch.where(sums == 0, 0.0, products.map_weights[index] / sums)
        average = exponentials.mul_(factor) if average is None else average.addcmul_(exponentials, factor)
    assert average is not None
    return average
