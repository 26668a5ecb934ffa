"""Random calls of the operations for `corrdit.benchmark.kernel_check`, each by its number."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from corrdit.benchmark.kernel_cases import (
    BRAIN,
    DIFFERENTIABLE,
    DISPLACEMENTS,
    HALF,
    LAYOUTS,
    MODES,
    OPERATIONS,
    SINGLE,
    Case,
)
from corrdit.grid import TokenGrid


def random_case(number: int) -> Case:
    """The call of a number: an operation with any of its options together, on a few dozen tokens, one to three frames.

    The numbers of one remainder by six are of one operation.
    """
    draw = random.Random(number)
    operation = OPERATIONS[number % len(OPERATIONS)]
    grid = TokenGrid(
        draw.randint(1, 3), draw.randint(1, 6), draw.randint(1, 8), text_tokens=draw.choice((0, 3, 17)),
        text_first=draw.random() < 0.5,
    )  # fmt: skip
    key_heads = draw.randint(1, 2)
    case = Case(
        operation, f"random case {number}", grid, draw.choice((HALF, BRAIN, SINGLE)), draw.randint(8, 40),
        batch=draw.randint(1, 2), heads=key_heads * draw.randint(1, 3), key_heads=key_heads,
        layout=draw.choice(LAYOUTS), masked=draw.choice((0.0, 0.3, 0.8)), with_text=draw.random() < 0.5,
        undefined=draw.random() < 0.5, size=draw.choice((0.5, 1.6)), seed=number,
    )  # fmt: skip
    held = _random_part(draw, grid)
    options = dict(held)
    if draw.random() < 0.4:
        options["scale"] = draw.uniform(0.2, 1.5) * case.head_dim**-0.5
    if operation == "frame_local_attention":
        options |= {"renormalize": draw.random() < 0.5, "span": draw.randint(0, 2)}
        asked = ["q", "k", "v", "qk", "qv", "kv", "qkv"]
    else:
        options |= _random_heads(draw, case.heads)
        asked = ["q", "k", "qk"]
    if operation in DISPLACEMENTS:
        options |= _random_pairs(draw, grid, held)
        case = replace(case, moved="window" in options and draw.random() < 0.5)
    elif operation != "frame_local_attention":
        options |= _random_source(draw, grid, operation, held)
    case = replace(case, asked=draw.choice(asked))
    if operation in DIFFERENTIABLE and options.get("heads") != "probabilities":
        options["return_lse"] = draw.random() < 0.5
        if draw.random() < 0.2:
            limits = sorted({0, grid.video_tokens, *(draw.randrange(grid.video_tokens) for _ in range(2))})
            case, options["return_lse"] = replace(case, shards=tuple(limits)), True
    if not case.shards and draw.random() < 0.4:
        start = draw.randrange(grid.video_tokens)
        options["keys"] = (start, draw.randint(start + 1, grid.video_tokens))
    return replace(case, options=options)


def _random_part(draw: random.Random, grid: TokenGrid) -> dict[str, Any]:
    """Which queries q holds."""
    kind = draw.choice(("all", "all", "range", "frames"))
    if kind == "range":
        start = draw.randrange(grid.video_tokens)
        return {"queries": (start, draw.randint(start + 1, grid.video_tokens))}
    if kind == "frames":
        return {"query_frames": draw.sample(range(grid.frames), draw.randint(1, grid.frames))}
    return {}


def _random_heads(draw: random.Random, heads: int) -> dict[str, Any]:
    mode = draw.choice(MODES)
    if mode == "none" or draw.random() < 0.4:
        return {"heads": mode}
    weights = [draw.choice((0.0, 1.0, 2.5)) for _ in range(heads)]
    weights[draw.randrange(heads)] = 1.5
    return {"heads": mode, "head_weights": weights}


def _held_frames(grid: TokenGrid, held: dict[str, Any]) -> list[int]:
    if "queries" in held:
        start, stop = held["queries"]
        return list(range(start // grid.tokens_per_frame, -(-stop // grid.tokens_per_frame)))
    return list(held.get("query_frames", range(grid.frames)))


def _random_pairs(draw: random.Random, grid: TokenGrid, held: dict[str, Any]) -> dict[str, Any]:
    """Pairs, temperature and window of a displacement."""
    options: dict[str, Any] = {"temperature": draw.choice((1.0, 0.4, 2.0))}
    if draw.random() < 0.5:
        options["window"] = draw.randint(0, 4)
    kind, frames = draw.choice(("all", "near", "listed")), _held_frames(grid, held)
    # A range over several frames takes as many pairs for each of them.
    if kind == "near" and ("queries" not in held or len(frames) == 1):
        options["frames"] = draw.randint(0, 1)
    if kind == "listed":
        others = [draw.randrange(grid.frames) for _ in range(draw.randint(1, 3))]
        if "queries" in held:
            options["frames"] = [(frame, other) for frame in frames for other in others]
        else:
            options["frames"] = [(draw.choice(frames), other) for other in others]
    return options


def _random_source(draw: random.Random, grid: TokenGrid, operation: str, held: dict[str, Any]) -> dict[str, Any]:
    """Source frame, its tokens, and targets of what is measured from one frame."""
    frames, size = _held_frames(grid, held), grid.tokens_per_frame
    source = draw.choice(frames)
    options: dict[str, Any] = {"source": source}
    start, stop = held.get("queries", (0, grid.video_tokens))
    first, last = max(start - source * size, 0), min(stop - source * size, size)
    if operation != "match":
        options["tokens"] = [draw.randrange(first, last) for _ in range(draw.randint(1, 4))]
    else:
        whole = frames if "queries" not in held else range(grid.frames)
        options |= {"targets": draw.sample(list(whole), draw.randint(1, len(whole))), "refine": draw.choice((0, 0, 1))}
    if operation != "attention_mass":
        all_held = "queries" not in held and (operation == "match" or len(frames) == grid.frames)
        options["bidirectional"] = all_held and draw.random() < 0.6
    return options
