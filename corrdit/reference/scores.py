"""Score maps between two sets of tokens: logits, their reduction over heads, masks and softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.problem import PairProblem, TokenAxis, working_dtype


def on_whole_grid(q: Tensor, k: Tensor, problem: PairProblem) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and key mask of the whole problem that a problem is a part of.

    Returns:
        q `[B, H, N, D]`, 0 where q holds nothing: the rows of those tokens are for the caller to drop. k (or v)
        `[B, H, N, D]`, a head for each of the queries', 0 where a key is removed or not held, and bool `[B, N]`,
        True = may be attended and is held, or None.
    """
    mask = problem.key_mask
    if mask is None and problem.keys.selection != "all":
        mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if problem.key_mask is not None:
        # A score that is masked afterwards still multiplies a removed key in the backward pass, and 0 times NaN is NaN.
        k = k.masked_fill(~problem.key_mask[:, None, :, None], 0.0)
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    grid = problem.grid
    whole_mask = None if mask is None else _on_grid(mask, problem.keys, grid, 1)
    return _on_grid(q, problem.queries, grid, 2), _on_grid(k, problem.keys, grid, 2), whole_mask


def place_in_grid(axis: TokenAxis, grid: TokenGrid) -> Tensor:
    """int64 `[tokens]`: where the tokens of an axis stand in the grid's."""
    order = torch.arange(grid.tokens, device="cpu")
    places = torch.empty(axis.tokens, dtype=torch.int64, device="cpu")
    places[axis.text] = order[grid.text_slice][: axis.text.stop - axis.text.start]
    for frame_number, held in axis.frames.items():
        places[held.place] = order[grid.frame_slice(frame_number)][held.first : held.stop]
    return places


def _on_grid(tensor: Tensor, axis: TokenAxis, grid: TokenGrid, dim: int) -> Tensor:
    if axis.selection == "all":
        return tensor
    shape = list(tensor.shape)
    shape[dim] = grid.tokens
    return tensor.new_zeros(shape).index_copy(dim, place_in_grid(axis, grid).to(tensor.device), tensor)


def logits_between(queries: Tensor, keys: Tensor, problem: PairProblem) -> Tensor:
    """`factor * q.k` between `[B, H, P, D]` and `[B, H, K, D]`.

    Returns:
        `[B, 1, P, K]` for heads="logits", the weighted mean over heads, and for "features", between the weighted means
        of queries and of keys; `[B, H, P, K]` otherwise.
    """
    dtype = working_dtype(queries.dtype)
    queries, keys = queries.to(dtype), keys.to(dtype)
    if problem.heads == "features":
        queries, keys = (torch.einsum("bhnd,h->bnd", t, problem.weights).unsqueeze(1) for t in (queries, keys))
    scores = problem.factor * _products(queries, keys, every_key_is_seen=problem.window is None)
    if problem.heads == "logits":
        scores = torch.einsum("bhpk,h->bpk", scores, problem.weights).unsqueeze(1)
    return scores


def _products(queries: Tensor, keys: Tensor, *, every_key_is_seen: bool) -> Tensor:
    """q.k `[B, H, P, K]`, whose gradient in a query is free of the NaN and infinity of keys that the query cannot see.

    In the backward pass a score that is masked multiplies its key by 0, which does not take a NaN away. So a key that
    is not finite has its products, but no part in the gradients: a query that sees it gets NaN from its softmax.
    """
    products = torch.einsum("bhpd,bhkd->bhpk", queries, keys)
    if every_key_is_seen or not products.requires_grad:
        return products
    finite = keys.isfinite().all(-1)
    clean = torch.einsum("bhpd,bhkd->bhpk", queries, keys.masked_fill(~finite.unsqueeze(-1), 0.0))
    return torch.where(finite.unsqueeze(-2), clean, products.detach())


def masked_softmax(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis among the allowed keys; a row without any gives zeros."""
    if allowed is None:
        return logits.softmax(-1)
    allowed = allowed.expand_as(logits)
    some_key = allowed.any(-1, keepdim=True)
    # An empty row gets finite logits before the softmax, so that neither it nor its gradient is NaN.
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some_key, 0.0)
    return logits.softmax(-1).masked_fill(~some_key, 0.0)


def log_sum_exp(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The logarithm of what `masked_softmax` divides by; -inf for a row without keys."""
    if allowed is None:
        return logits.logsumexp(-1)
    allowed = allowed.expand_as(logits)
    some_key = allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed, float("-inf")).masked_fill(~some_key, 0.0)
    return logits.logsumexp(-1).masked_fill(~some_key.squeeze(-1), float("-inf"))


def reduce_heads(maps: Tensor, problem: PairProblem) -> Tensor:
    """`[B, H, ...]` to `[B, 1, ...]`: the mean for "probabilities", as is for the others."""
    if problem.heads != "probabilities":
        return maps
    return torch.einsum("bh...,h->b...", maps, problem.weights).unsqueeze(1)


def window_mask(grid: TokenGrid, window: int, center: Tensor | None, device: torch.device) -> Tensor:
    """`[B or 1, 1, S, S]`: which keys lie within `window` rows and columns of the window's centre.

    Args:
        center: `[B, S, 2]` centre (x, y) in tokens of the key frame, rounded to a token and moved into the frame; None
            for each query's own position.
    """
    position = grid.coordinates(device)
    if center is None:
        middle = position.unsqueeze(0)
    else:
        last = torch.tensor([grid.width - 1, grid.height - 1], device=device, dtype=center.dtype)
        middle = center.round().clamp(min=torch.zeros_like(last), max=last).to(position.dtype)
    offset = (position[None, None] - middle.unsqueeze(2)).abs()
    return (offset <= window).all(-1).unsqueeze(1)


def allowed_keys(problem: PairProblem, index: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """`[B or 1, 1, S or 1, S]` keys that the queries of a pair may use, None where every key is allowed.

    Args:
        mask: bool `[B, N]` of the whole grid.
    """
    grid, (query_frame, key_frame) = problem.grid, problem.pairs[index]
    allowed = None if mask is None else frame(mask, grid, key_frame)[:, None, None, :]
    if problem.window is None:
        return allowed
    center = problem.center
    if center is not None:
        rows, held = problem.pair_rows()[index], problem.queries.frames[query_frame]
        of_frame = center.new_zeros(center.shape[0], grid.tokens_per_frame, 2)
        of_frame[:, held.first : held.stop] = center[:, rows]
        center = of_frame
    inside = window_mask(grid, problem.window, center, device)
    return inside if allowed is None else inside & allowed


def held_rows(of_pairs: list[Tensor], problem: PairProblem) -> Tensor:
    """`[B, H or 1, R, ...]` from `[B, H or 1, S, ...]` for each pair: the rows of those queries that q holds."""
    kept = []
    for (query_frame, _), rows in zip(problem.pairs, of_pairs, strict=True):
        held = problem.queries.frames[query_frame]
        kept.append(rows[:, :, held.first : held.stop])
    return torch.cat(kept, 2)


def frame(tensor: Tensor, grid: TokenGrid, index: int) -> Tensor:
    """The tokens of one frame of `[B, H, N, D]` (or of a `[B, N]` mask)."""
    part = grid.frame_slice(index)
    return tensor[:, part] if tensor.ndim == 2 else tensor[:, :, part]
