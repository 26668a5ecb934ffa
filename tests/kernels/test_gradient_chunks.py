"""The chunks of the gradient of averaged logits: each pair that counts is in one, and windows cost what they reach."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.kernels.displacement import folded_backward, gradient_chunks
from corrdit.kernels.displacement.gradient_chunks import Chunk
from corrdit.kernels.shared.tables import whole_frames

ROOM = folded_backward.WORKSPACE_BYTES // 2


def every_pair(frames: int) -> list[int]:
    return [frame for i in range(frames) for j in range(frames) for frame in (i, j)]


def chunks(pairs: list[int], frames: int, height: int, width: int, radius: int, room: int = ROOM) -> list[Chunk]:
    places = whole_frames(frames, height * width)
    return gradient_chunks.gradient_chunks(pairs, places, places, height * width, height, width, radius, room)


def products(cut: list[Chunk]) -> int:
    """Elements of dlogit that the two products multiply."""
    return sum(chunk.queries.total * chunk.keys.total for chunk in cut)


@pytest.mark.parametrize("pairs", [every_pair(3), [0, 1, 1, 1, 2, 1], [2, 0, 0, 1, 0, 2, 1, 1, 1, 2], [1, 1]])
@pytest.mark.parametrize(("radius", "room", "rows"), [(-1, 10**6, 8), (1, 10**6, 8), (0, 10**6, 100), (1, 2000, 8)])
def test_every_pair_of_a_query_and_a_key_in_reach_is_in_one_chunk(monkeypatch, pairs, radius, room, rows):
    frames, height, width = 3, 5, 4
    monkeypatch.setattr(gradient_chunks, "_ROWS_OF_BAND", rows)
    monkeypatch.setattr(gradient_chunks, "_ELEMENTS_OF_TOKEN", 0)
    cut = chunks(pairs, frames, height, width, radius, room)
    tokens = height * width
    times = torch.zeros(len(pairs) // 2, tokens, tokens)
    for chunk in cut:
        assert chunk.elements <= room
        for a, b in itertools.product(range(chunk.queries.pieces), range(chunk.key_frames)):
            pair = chunk.first_pair + a * chunk.pair_step + b
            queries = slice(chunk.first_row, chunk.first_row + chunk.queries.tokens)
            keys = slice(max(chunk.first_key, 0), min(chunk.stop_key, tokens))
            times[pair, queries, keys] += 1
            i, j = pairs[2 * pair : 2 * pair + 2]
            assert chunk.queries.first + a * chunk.queries.step == i * tokens + queries.start
            of_chunk = b * (keys.stop - keys.start)
            place = chunk.keys.first + of_chunk // chunk.keys.tokens * chunk.keys.step + of_chunk % chunk.keys.tokens
            assert place == j * tokens + keys.start
    row = torch.arange(tokens) // width
    needed = torch.ones(tokens, tokens) if radius < 0 else ((row[:, None] - row).abs() <= radius).float()
    assert times.max() == 1
    assert (times >= needed).all()


@pytest.mark.parametrize(("radius", "share"), [(4, 0.307), (8, 0.511), (30, 1.0)])
def test_windows_multiply_the_token_rows_that_they_reach(radius, share):
    """CogVideoX-5B, the shares of `benchmarks/NOTES.md`: 13 frames of 30 x 45 tokens."""
    dense, banded = (chunks(every_pair(13), 13, 30, 45, of) for of in (-1, radius))
    assert products(dense) == 13**2 * 1350**2
    assert products(banded) / products(dense) == pytest.approx(share, abs=5e-4)
    assert max(chunk.elements for chunk in banded) <= ROOM


def test_small_frames_are_not_cut_into_bands():
    assert chunks(every_pair(4), 4, 16, 16, 1) == chunks(every_pair(4), 4, 16, 16, -1)


def test_bands_of_many_frames_fit_the_workspace():
    cut = chunks(every_pair(33), 33, 45, 80, 8)
    assert max(chunk.elements for chunk in cut) <= ROOM
    assert products(cut) <= 0.36 * 33**2 * 3600**2


@pytest.mark.parametrize("frames", [None, 0, [(0, 2), (1, 2)]])
def test_bands_give_what_whole_chunks_give(monkeypatch, frames):
    grid = TokenGrid(3, 5, 4)
    q, k = (torch.randn(1, 2, grid.tokens, 16, requires_grad=True) for _ in range(2))
    launched: list[int] = []
    write = folded_backward._FoldedGradient.write

    def watched(self: Any, workspace: torch.Tensor, sample: int, chunk: Chunk) -> torch.Tensor:
        launched.append(chunk.queries.total * chunk.keys.total)
        return write(self, workspace, sample, chunk)

    monkeypatch.setattr(folded_backward._FoldedGradient, "write", watched)
    monkeypatch.setattr(gradient_chunks, "_ELEMENTS_OF_TOKEN", 0)

    def gradients(rows: int) -> tuple[torch.Tensor, ...]:
        monkeypatch.setattr(gradient_chunks, "_ROWS_OF_BAND", rows)
        launched.clear()
        moved = ops.soft_displacement(q, k, grid, heads="logits", frames=frames, window=1, backend="triton")
        return torch.autograd.grad(moved.square().sum(), (q, k))

    whole = gradients(10**9)
    of_whole = sum(launched)
    banded = gradients(8)
    assert sum(launched) < of_whole
    for mine, theirs in zip(banded, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
