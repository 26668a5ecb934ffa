"""Checks of what a user passes to an operation, with errors that say what was given and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from corrdit.arguments import choice, entries, finite_number, flag, whole_number
from corrdit.grid import TokenGrid
from corrdit.problem import DTYPES, HEAD_MODES, HeldFrame, PairProblem, TokenAxis, product_precision, working_dtype

# Two such factors and log2(e) still multiply to an ordinary float32.
SMALLEST_FACTOR = 1e-18


def checked_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    grid: TokenGrid,
    *,
    heads: str = "none",
    head_weights: Tensor | Iterable[float] | None = None,
    scale: float | None,
    temperature: float = 1.0,
    key_mask: Tensor | None,
    queries: tuple[int, int] | None,
    query_frames: Iterable[int] | None,
    keys: tuple[int, int] | None,
    return_lse: bool = False,
    memory_budget: int | None,
) -> PairProblem:
    """The arguments that operations share, checked; pairs and windows are for the operation to add."""
    check_tensors(grid, q, k, v)
    query_axis = _query_axis(q, queries, query_frames, grid)
    key_axis = _range_axis("k", "keys", k, keys, grid)
    factor = q.shape[-1] ** -0.5 if scale is None else check_factor("scale", scale)
    if flag("return_lse", return_lse) and heads == "probabilities":
        raise ValueError(
            'return_lse with heads="probabilities" has no single softmax to give the log-sum-exp of; take '
            'heads="none", and average after ops.merge'
        )
    weights, read_heads = check_heads(heads, head_weights, q)
    return PairProblem(
        grid,
        query_axis,
        key_axis,
        factor * check_factor("temperature", temperature),
        heads=heads,
        weights=weights,
        read_heads=read_heads,
        key_mask=check_key_mask(key_mask, k, key_axis, grid),
        with_lse=bool(return_lse),
        memory_budget=None if memory_budget is None else whole_number("memory_budget (bytes)", memory_budget, 1),
        precision=product_precision(),
    )


def check_tensors(grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """Every tensor is `[B, H, N, D]` of one dtype and device, up to the tokens and fewer heads of k and v."""
    if not isinstance(grid, TokenGrid):
        raise ValueError(f"grid must be a corrdit.TokenGrid, got {type(grid).__name__}")
    for name, tensor in (("q", q), ("k", k), *([("v", v)] if v is not None else [])):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor [batch, heads, tokens, head_dim], got {type(tensor).__name__}")
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} must be [batch, heads, tokens, head_dim], none empty, got {list(tensor.shape)}")
        check_readable(name, tensor)
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if (q.shape[0], q.shape[3]) != (tensor.shape[0], tensor.shape[3]) or q.shape[1] % tensor.shape[1]:
            raise ValueError(
                f"q and {name} must have the same shape, up to their tokens and heads of {name} that divide those of "
                f"q, got {list(q.shape)} and {list(tensor.shape)}"
            )
        for what, here, there in (("dtype", q.dtype, tensor.dtype), ("device", q.device, tensor.device)):
            if here != there:
                raise ValueError(f"q and {name} must have the same {what}, got {here} and {there}")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"k and v must have the same shape, got {list(k.shape)} and {list(v.shape)}")


def check_readable(name: str, tensor: Tensor) -> None:
    """A tensor with a number in every place."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors have no values; give it on a real device")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is a sparse tensor ({tensor.layout}); give it dense, as {name}.to_dense()")


def _query_axis(
    q: Tensor, queries: tuple[int, int] | None, query_frames: Iterable[int] | None, grid: TokenGrid
) -> TokenAxis:
    if query_frames is None:
        return _range_axis("q", "queries", q, queries, grid)
    if queries is not None:
        raise ValueError("queries and query_frames both say which queries q holds; give one of them")
    frames = [check_frame("query_frames", frame, grid) for frame in entries("query_frames", query_frames)]
    if not frames or len(set(frames)) < len(frames):
        raise ValueError(f"query_frames must be at least one frame, each once, got {frames}")
    held = len(frames) * grid.tokens_per_frame
    return TokenAxis.of_frames(grid, frames, text=_holds_text("q", q, held, f"query_frames={frames}", grid))


def _range_axis(name: str, argument: str, tensor: Tensor, given: tuple[int, int] | None, grid: TokenGrid) -> TokenAxis:
    if given is None:
        if tensor.shape[2] != grid.tokens:
            raise ValueError(
                f"{name} has {tensor.shape[2]} tokens, but the grid has {grid.tokens} "
                f"({grid.text_tokens} text + {grid.frames} frames x {grid.height} x {grid.width}); "
                f"the grid must describe the whole token axis, and {argument} say which part of it {name} holds"
            )
        return TokenAxis.of_grid(grid)
    limits = entries(argument, given)
    if len(limits) != 2:
        raise ValueError(f"{argument} must be (start, stop), got {given!r}")
    start = whole_number(f"start of {argument}", limits[0], 0)
    stop = whole_number(f"stop of {argument}", limits[1], start + 1)
    if stop > grid.video_tokens:
        raise ValueError(f"{argument} must end within the {grid.video_tokens} video tokens, got ({start}, {stop})")
    text = _holds_text(name, tensor, stop - start, f"{argument}=({start}, {stop})", grid)
    return TokenAxis.of_range(grid, start, stop, text=text)


def _holds_text(name: str, tensor: Tensor, held: int, said: str, grid: TokenGrid) -> bool:
    """Whether a tensor holds the text beside the video tokens asked for."""
    if tensor.shape[2] not in (held, held + grid.text_tokens):
        with_text = f", or {held + grid.text_tokens} with the text" if grid.text_tokens else ""
        raise ValueError(f"{name} has {tensor.shape[2]} tokens, but {said} are {held} video tokens{with_text}")
    return tensor.shape[2] != held


def may_read(tensor: Tensor) -> bool:
    """Whether values may be looked at: not while a graph is traced or captured, which that would break."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def check_factor(name: str, value: object) -> float:
    """`value` as a finite float above zero, of a size whose products float32 holds."""
    number = finite_number(name, value, above=0)
    if not SMALLEST_FACTOR <= number <= 1 / SMALLEST_FACTOR:
        raise ValueError(f"{name} must lie in {SMALLEST_FACTOR:g} to {1 / SMALLEST_FACTOR:g}, got {value}")
    return number


def check_key_mask(key_mask: Tensor | None, k: Tensor, axis: TokenAxis, grid: TokenGrid) -> Tensor | None:
    """bool `[B, tokens of k]`, True = may be attended, from that or from one of the whole token axis."""
    if key_mask is None:
        return None
    expected = [k.shape[0], k.shape[2]]
    whole = [k.shape[0], grid.tokens]
    shape = list(key_mask.shape) if isinstance(key_mask, Tensor) else None
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or shape not in (expected, whole):
        given = f"{key_mask.dtype} {shape}" if isinstance(key_mask, Tensor) else type(key_mask).__name__
        or_whole = "" if expected == whole else f", or of all tokens = {whole}"
        raise ValueError(
            f"key_mask must be a bool tensor [batch, tokens] = {expected}{or_whole}, True = may be attended, "
            f"got {given}"
        )
    if key_mask.device != k.device:
        raise ValueError(f"key_mask is on {key_mask.device}, q on {k.device}; they must be on one device")
    check_readable("key_mask", key_mask)
    if shape == expected:
        return key_mask
    start = min(frame * grid.tokens_per_frame + held.first for frame, held in axis.frames.items()) + grid.video_start
    parts = [key_mask[:, start : start + axis.video.stop - axis.video.start]]
    if axis.text.stop > axis.text.start:
        parts.insert(0 if grid.text_first else 1, key_mask[:, grid.text_slice])
    return torch.cat(parts, 1)


def check_heads(
    heads: str, head_weights: Tensor | Iterable[float] | None, q: Tensor
) -> tuple[Tensor | None, list[int] | None]:
    """The weights over heads `[H]` (summing to 1, in the working precision; None for heads="none"), and those not 0.

    The heads whose weight is not 0 are None where that is all of them, or cannot be known without breaking a graph.
    """
    choice("heads", heads, HEAD_MODES)
    dtype, count = working_dtype(q.dtype), q.shape[1]
    if heads == "none":
        if head_weights is not None:
            raise ValueError('head_weights average heads, but heads="none" keeps them apart; drop one of the two')
        return None, None
    if head_weights is None:
        # One number expanded: by its stride a backend knows equal weights without reading them from the device.
        return torch.full((1,), 1 / count, dtype=dtype, device=q.device).expand(count), None
    if isinstance(head_weights, Tensor):
        weights, numbers = _weights_of_tensor(head_weights.detach(), count)
        return weights.to(device=q.device, dtype=dtype), _not_zero(numbers)
    numbers = [finite_number("a weight of head_weights", entry) for entry in entries("head_weights", head_weights)]
    if len(numbers) != count:
        raise ValueError(f"head_weights must have one weight a head, [{count}], got [{len(numbers)}]")
    largest = max(numbers)
    if min(numbers) < 0 or largest <= 0:
        raise ValueError(f"head_weights must be finite, not negative and not all zero, got {numbers}")
    shares = [number / largest for number in numbers]
    weights = torch.tensor([share / sum(shares) for share in shares], dtype=dtype, device=q.device)
    return weights, _not_zero(shares)


def _not_zero(numbers: list[float] | None) -> list[int] | None:
    """The places of those that are not 0, None for all of them or where they are not known."""
    kept = [place for place, number in enumerate(numbers or []) if number]
    return None if numbers is None or len(kept) == len(numbers) else kept


def _weights_of_tensor(weights: Tensor, count: int) -> tuple[Tensor, list[float] | None]:
    """`[H]` normalised to sum 1, and the numbers as given where they may be read."""
    check_readable("head_weights", weights)
    if list(weights.shape) != [count] or weights.is_complex():
        raise ValueError(
            f"head_weights must have one real weight a head, [{count}], got {list(weights.shape)} {weights.dtype}"
        )
    weights = weights.to(working_dtype(weights.dtype))
    numbers = weights.tolist() if may_read(weights) else None
    if numbers is not None and not (all(0 <= number < math.inf for number in numbers) and any(numbers)):
        raise ValueError(f"head_weights must be finite, not negative and not all zero, got {numbers}")
    # By the largest first: the sum of large weights might overflow.
    weights = weights / weights.amax()
    return weights / weights.sum(), numbers


def check_frame(name: str, frame: object, grid: TokenGrid) -> int:
    index = whole_number(name, frame, 0)
    if index >= grid.frames:
        raise ValueError(f"{name} is frame {index}, but the grid has frames 0 to {grid.frames - 1}")
    return index


def held_source(problem: PairProblem, source: int) -> HeldFrame:
    """What q holds of the source frame."""
    if source not in problem.queries.frames:
        raise ValueError(
            f"q holds no query of the source frame {source}; it holds frames {list(problem.queries.frames)}"
        )
    return problem.queries.frames[source]


def check_both_directions(problem: PairProblem) -> None:
    """The backward softmax asks every token of a target frame."""
    for _, target in problem.pairs:
        held = problem.queries.frames.get(target)
        if held is None or held.tokens < problem.grid.tokens_per_frame:
            raise ValueError(
                f"bidirectional=True needs the queries of all of frame {target}, which q does not hold; give them too, "
                "or take bidirectional=False"
            )


def check_frame_tokens(
    tokens: Tensor | Iterable[int], problem: PairProblem, source: int, device: torch.device
) -> Tensor:
    """int64 `[P]` flat token indices row * width + column within the source frame, all of which q holds."""
    held = held_source(problem, source)
    if isinstance(tokens, Tensor):
        check_readable("tokens", tokens)
        integral = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
        if tokens.ndim != 1 or tokens.numel() == 0 or not integral:
            raise ValueError(
                "tokens must be a non-empty list or 1-D integer tensor of flat indices, "
                f"got {list(tokens.shape)} {tokens.dtype}"
            )
        indices = tokens.to(torch.int64)
        if not may_read(indices):
            return indices.to(device)
        lowest, highest = int(indices.min()), int(indices.max())
    else:
        numbers = [whole_number("a token of tokens", entry, 0) for entry in entries("tokens", tokens)]
        if not numbers:
            raise ValueError("tokens is an empty list; give at least one flat index of the source frame")
        lowest, highest = min(numbers), max(numbers)
    if lowest < held.first or highest >= held.stop:
        wrong = lowest if lowest < held.first else highest
        frame = (
            "the source frame" if held.tokens == problem.grid.tokens_per_frame else "what q holds of the source frame"
        )
        raise ValueError(
            f"token {wrong} is outside {frame}, whose flat indices go from {held.first} to {held.stop - 1}"
        )
    return indices.to(device) if isinstance(tokens, Tensor) else torch.tensor(numbers, device=device)
