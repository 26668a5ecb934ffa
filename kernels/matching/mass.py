"""Attention mass: the operation and its registration with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.kernels.matching.correspondence import arrange_heads, exponent
from corrdit.kernels.matching.token_rows import mass_of_rows, row_statistics
from corrdit.kernels.shared.inputs import kernel_input
from corrdit.kernels.shared.launch import unequal_weights
from corrdit.kernels.shared.tables import segments_made_outside
from corrdit.problem import PairProblem, float32_precision


def mass_segments(
    text_first: int, text_tokens: int, video_first: int, frames: int, frame_tokens: int
) -> list[tuple[int, int]]:
    """(first token, tokens) of the text and of every frame."""
    return [(text_first, text_tokens), *((video_first + f * frame_tokens, frame_tokens) for f in range(frames))]


def compute_attention_mass(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    key_mask: Tensor | None,
    text_first: int,
    text_tokens: int,
    video_first: int,
    frames: int,
    source: int,
    heads: str,
    scale: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """(sum, peak) float32 `[B, H or 1, 1 + F, R]` over the text (0 without text), then each frame."""
    frame_tokens = (q.shape[2] - text_tokens) // frames
    arrangement = arrange_heads(q, heads, weights)
    q, factor = exponent(q, scale, arrangement)
    rows = tokens.to(torch.int64) + video_first + source * frame_tokens
    segments = mass_segments(text_first, text_tokens, video_first, frames, frame_tokens)
    with float32_precision(precision):
        statistics = row_statistics(q, k, rows, [(0, q.shape[2])], arrangement, factor, key_mask)
        return mass_of_rows(q, k, rows, segments, arrangement, factor, key_mask, statistics)


_attention_mass = torch.library.custom_op("corrdit::attention_mass", compute_attention_mass, mutates_args=())


@_attention_mass.register_fake
def _(
    q: Tensor, k: Tensor, tokens: Tensor, weights: object, key_mask: object, text_first: int, text_tokens: int,
    video_first: int, frames: int, source: int, heads: str, scale: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], q.shape[1] if heads == "none" else 1, 1 + frames, tokens.shape[0])
    return q.new_empty(shape, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def attention_mass(
    q: Tensor, k: Tensor, problem: PairProblem, tokens: Tensor, *, source: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text `[B, H or 1, P]`, frames `[B, H or 1, P, F]`, text peak, frame peak); see `corrdit.ops.attention_mass`.

    Arguments and errors as in `corrdit.kernels.soft_displacement`.
    """
    q, k, problem = kernel_input(q, k, problem, video_only=False)
    grid = problem.grid
    text_place = grid.text_slice.start, grid.text_tokens
    segments_made_outside(mass_segments(*text_place, grid.video_start, grid.frames, grid.tokens_per_frame), q)
    segments_made_outside([(0, grid.tokens)], q)
    sums, peaks = _attention_mass(
        q.detach(), k.detach(), tokens, unequal_weights(problem.weights), problem.key_mask, grid.text_slice.start,
        grid.text_tokens, grid.video_start, grid.frames, source, problem.heads, problem.factor, problem.precision,
    )  # fmt: skip
    text, frames = sums[..., 0, :], sums[..., 1:, :].transpose(-1, -2)
    return text, frames, peaks[..., 0, :], peaks[..., 1:, :].transpose(-1, -2)
