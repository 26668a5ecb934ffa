"""Every operation with its rivals and the work that it cannot do without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from corrdit import ops
from corrdit.benchmark.baselines import attention_positions, compiled, folded_chunks, materialized, window_gather
from corrdit.benchmark.shapes import Shape
from corrdit.grid import TokenGrid

Results = tuple[Tensor, ...]
WINDOW = 4
QUERY_TOKENS = 256


@dataclass(frozen=True)
class Scene:
    """Inputs of a call; `video` has no text tokens, and neither have its q and k."""

    grid: TokenGrid
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def video(self) -> tuple[Tensor, Tensor, TokenGrid]:
        part = self.grid.video_slice
        return self.q[:, :, part], self.k[:, :, part], self.grid.without_text()

    @property
    def chosen_tokens(self) -> range:
        tokens = self.grid.tokens_per_frame
        return range(0, tokens, max(1, tokens // QUERY_TOKENS))


@dataclass(frozen=True)
class Rival:
    """Another way to compute an operation.

    Attributes:
        run: the call.
        whole_maps: score maps over all token pairs that it holds at once, for one head if `heads_at_once` is False.
        device: the only kind of device it runs on; None for any.
        about: says what to know of a call, such as which library kernel it ends up in.
    """

    run: Callable[[Scene], Results]
    whole_maps: float = 0.0
    heads_at_once: bool = True
    device: str | None = None
    about: Callable[[Scene], str] | None = None

    def held_bytes(self, shape: Shape, element_bytes: int) -> float:
        """Bytes of the maps it cannot do without."""
        heads = shape.heads if self.heads_at_once else 1
        return self.whole_maps * heads * shape.grid.tokens**2 * element_bytes


@dataclass(frozen=True)
class Contest:
    """An operation, its rivals, and its floor.

    Attributes:
        run: the call; takes the backend.
        products: floating-point operations of the matrix products that the forward pass cannot do without.
        backward_products: the same for the backward pass, as a multiple of the forward pass; None without gradients.
    """

    run: Callable[[Scene, str], Results]
    products: Callable[[Shape], float]
    backward_products: float | None = None
    rivals: dict[str, Rival] = field(default_factory=dict)


def _pairs(shape: Shape) -> float:
    return float(shape.frames * shape.height * shape.width) ** 2


def _all_pairs(shape: Shape) -> float:
    return 2 * shape.heads * shape.head_dim * _pairs(shape)


def _window_pairs(shape: Shape) -> float:
    return _all_pairs(shape) * (2 * WINDOW + 1) ** 2 / (shape.height * shape.width)


def _both_directions(shape: Shape) -> float:
    return 2 * _all_pairs(shape) * (shape.frames - 1) / shape.frames**2


def _row_sums_and_rows(shape: Shape) -> float:
    tokens = shape.height * shape.width
    return 2 * shape.heads * shape.head_dim * shape.frames * (tokens**2 + 2 * min(QUERY_TOKENS, tokens) * tokens)


def _chosen_rows(shape: Shape) -> float:
    return 2 * shape.heads * shape.head_dim * min(QUERY_TOKENS, shape.height * shape.width) * shape.grid.tokens


def _near_pairs(shape: Shape) -> float:
    tokens = shape.height * shape.width
    pairs = shape.frames * tokens * (tokens + shape.text_tokens) + shape.text_tokens * shape.grid.tokens
    return 4 * shape.heads * shape.head_dim * pairs


def _soft(scene: Scene, backend: str, **options: object) -> Results:
    return (ops.soft_displacement(scene.q, scene.k, scene.grid, backend=backend, **options),)  # type: ignore[arg-type]


def _folded_attention_kernel(scene: Scene) -> str:
    q, k, _ = scene.video
    return attention_positions.chosen_kernel(*(tensor.transpose(1, 2).flatten(2).unsqueeze(1) for tensor in (q, k)))


def _attention_kernel(scene: Scene) -> str:
    q, k, _ = scene.video
    return attention_positions.chosen_kernel(q, k)


CONTESTS = {
    "soft_displacement, logits": Contest(
        _soft,
        _all_pairs,
        backward_products=3,
        rivals={
            "materialized (DiTFlow)": Rival(lambda s: (materialized.soft_displacement(*s.video),), whole_maps=2),
            "folded chunks": Rival(lambda s: (folded_chunks.soft_displacement(*s.video),)),
            "attention with positions": Rival(
                lambda s: (attention_positions.soft_displacement(*s.video),), about=_folded_attention_kernel
            ),
            "compiled reference": Rival(lambda s: (compiled.soft_displacement(*s.video),), whole_maps=1, device="cuda"),
        },
    ),
    "soft_displacement, probabilities": Contest(
        functools.partial(_soft, heads="probabilities"),
        _all_pairs,
        backward_products=3,
        rivals={
            "attention with positions": Rival(
                lambda s: (attention_positions.soft_displacement(*s.video, heads="probabilities"),),
                about=_attention_kernel,
            ),
            "FlexAttention": Rival(lambda s: (compiled.flex_soft_displacement(*s.video),), device="cuda"),
            "compiled reference": Rival(
                lambda s: (compiled.soft_displacement(*s.video, heads="probabilities"),), whole_maps=1, device="cuda"
            ),
        },
    ),
    "soft_displacement, window": Contest(
        functools.partial(_soft, window=WINDOW),
        _window_pairs,
        backward_products=3,
        rivals={
            "gathered windows (FastVMT)": Rival(lambda s: (window_gather.soft_displacement(*s.video, window=WINDOW),)),
        },
    ),
    "hard_displacement, logits": Contest(
        lambda s, backend: (ops.hard_displacement(s.q, s.k, s.grid, backend=backend),),
        _all_pairs,
        rivals={
            "materialized (DiTFlow)": Rival(lambda s: (materialized.hard_displacement(*s.video),), whole_maps=2),
        },
    ),
    "match, probabilities": Contest(
        lambda s, backend: tuple(ops.match(s.q, s.k, s.grid, backend=backend)),
        _both_directions,
        rivals={
            "materialized (DiffTrack)": Rival(lambda s: tuple(materialized.match(*s.video)), whole_maps=0.5),
        },
    ),
    "cost_rows": Contest(
        lambda s, backend: (ops.cost_rows(s.q, s.k, s.grid, s.chosen_tokens, backend=backend),),
        _row_sums_and_rows,
    ),
    "attention_mass": Contest(
        lambda s, backend: tuple(ops.attention_mass(s.q, s.k, s.grid, s.chosen_tokens, backend=backend)),
        _chosen_rows,
    ),
    "frame_local_attention": Contest(
        lambda s, backend: (ops.frame_local_attention(s.q, s.k, s.v, s.grid, backend=backend),),
        _near_pairs,
        backward_products=2.5,
        rivals={
            "materialized (DiffTrack)": Rival(
                lambda s: (materialized.frame_local_attention(s.q, s.k, s.v, s.grid),), whole_maps=2
            ),
            "FlexAttention": Rival(
                lambda s: (compiled.flex_frame_local_attention(s.q, s.k, s.v, s.grid),), device="cuda"
            ),
        },
    ),
}
