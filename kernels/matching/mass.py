"""Attention mass: the operation and its registration with torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corrdit.kernels.matching.correspondence import arrange
from corrdit.kernels.matching.token_rows import mass_of_rows, row_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import unequal_weights
from corrdit.kernels.shared.tables import segments_made_outside
from corrdit.problem import PairProblem, TokenAxis, float32_precision


def mass_segments(keys: TokenAxis, frames: int) -> list[int]:
    """(first token, tokens) of what k holds of the text and of every frame, flat."""
    held = (keys.frames[frame].place if frame in keys.frames else slice(0, 0) for frame in range(frames))
    return [number for place in (keys.text, *held) for number in (place.start, place.stop - place.start)]


def compute_attention_mass(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    first_query: int,
    segments: Sequence[int],
    heads: str,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(sum, peak) float32 `[B, H or 1, 1 + F, R]` over the text (0 without text), then each frame.

    Args:
        tokens: `[R]` in the source frame, whose token 0 would stand at `first_query` in q. segments: `mass_segments`.
    """
    q, arrangement, _, factor = arrange(q, heads, weights, scale)
    rows = tokens.to(torch.int64) + first_query
    with float32_precision(precision):
        statistics = row_statistics(q, k, rows, [0, k.shape[2]], arrangement, factor, key_mask)
        return mass_of_rows(q, k, rows, segments, arrangement, factor, key_mask, statistics)


_attention_mass = torch.library.custom_op("corrdit::attention_mass", compute_attention_mass, mutates_args=())


@_attention_mass.register_fake
def _(
    q: Tensor, k: Tensor, tokens: Tensor, weights: object, key_mask: object, first_query: int, segments: Sequence[int],
    heads: str, scale: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], q.shape[1] if heads == "none" else 1, len(segments) // 2, tokens.shape[0])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def attention_mass(
    q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text `[B, H or 1, P]`, frames `[B, H or 1, P, F]`, text peak, frame peak); see `corrdit.ops.attention_mass`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem, video_only=False)
    segments = mass_segments(problem.keys, problem.grid.frames)
    for flat in (segments, [0, k.shape[2]]):
        segments_made_outside(flat, q)
    sums, peaks = _attention_mass(
        q.detach(), k.detach(), tokens, unequal_weights(problem.weights), problem.key_mask,
        problem.queries.frames[source].origin, segments, problem.heads, problem.factor, problem.precision,
    )  # fmt: skip
    text, frames = sums[..., 0, :], sums[..., 1:, :].transpose(-1, -2)
    return text, frames, peaks[..., 0, :], peaks[..., 1:, :].transpose(-1, -2)
