"""Attention of chosen tokens on the text and on every frame, in chunks of attention rows."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.problem import PairProblem
from corrdit.streaming.budget import keys_in_a_segment, rows_in_a_chunk
from corrdit.streaming.frame_pairs import LOG2_E
from corrdit.streaming.products import HeadProducts


@torch.no_grad()
def attention_mass(
    q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, frames, text peak, frame peak), `[B, H or 1, P]` and `[B, H or 1, P, F]`."""
    products, keys = HeadProducts(q, k, problem), problem.keys
    together = products.maps if products.averaged else 1
    size, frame_count = products.element_bytes, problem.grid.frames
    key_bytes = 2 * products.copied_width * size
    segment = keys_in_a_segment(problem.memory_budget, key_bytes, keys.tokens)
    rows = rows_in_a_chunk(
        problem.memory_budget,
        fixed_bytes=segment * key_bytes + keys.tokens,
        row_bytes=(keys.tokens * (1 + products.averaged) + 4 * q.shape[1] * q.shape[3] + 4 * frame_count + 16) * size,
        tile_row_bytes=keys.tokens * size,
        rows=tokens.numel(),
        device=q.device,
        purpose="attention mass",
    )
    shape = (q.shape[0], products.maps // together, tokens.numel())
    text, text_peak = (torch.zeros(shape, dtype=products.dtype, device=q.device) for _ in range(2))
    frames, frame_peak = (torch.zeros((*shape, frame_count), dtype=products.dtype, device=q.device) for _ in range(2))
    rows_of_maps = _AttentionRows(products, problem, rows, segment, q.device)
    with torch.autocast(q.device.type, enabled=False):
        for batch in range(q.shape[0]):
            removed = None if problem.key_mask is None else ~problem.key_mask[batch]
            for number in range(shape[1]):
                maps = range(number * together, (number + 1) * together)
                for start in range(0, tokens.numel(), rows):
                    part = slice(start, start + rows)
                    chosen = tokens[part] + problem.queries.frames[source].origin
                    attention = rows_of_maps.average(q[batch][:, chosen], k[batch], maps, removed)
                    place = (batch, number, part)
                    for frame, held in keys.frames.items():
                        of_frame = attention[:, held.place]
                        frames[(*place, frame)], frame_peak[(*place, frame)] = of_frame.sum(-1), of_frame.amax(-1)
                    if keys.text.stop > keys.text.start:
                        of_text = attention[:, keys.text]
                        text[place], text_peak[place] = of_text.sum(-1), of_text.amax(-1)
    return text, frames, text_peak, frame_peak


class _AttentionRows:
    """Rows of the softmax over all tokens; keys are read `segment` at a time."""

    def __init__(
        self, products: HeadProducts, problem: PairProblem, rows: int, segment: int, device: torch.device
    ) -> None:
        self.products, self.segment, self.factor = products, segment, problem.factor
        shape = (1 + products.averaged, rows, problem.keys.tokens)
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
        matrix = products.queries(products.query_heads(queries, index))
        for start in range(0, k.shape[1], self.segment):
            part = slice(start, start + self.segment)
            keys = products.keys(products.key_heads(k, index)[:, part])
            place = scores[:, part]
            torch.addmm(place, matrix, keys.t(), beta=0, alpha=self.factor * LOG2_E, out=place)
        if removed is not None:
            scores.masked_fill_(removed, float("-inf"))
        largest = scores.amax(-1, keepdim=True)
        if removed is not None:
            largest.masked_fill_(largest == float("-inf"), 0.0)
        exponentials = scores.sub_(largest).exp2_()
        sums = exponentials.sum(-1, keepdim=True)
        return exponentials, torch.where(sums == 0, 0.0, products.map_weights[index] / sums)
