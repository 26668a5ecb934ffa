"""About how long measurements take, so that a plan says whether it fits the time that a machine is lent for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from corrdit.benchmark.comparisons import COMPARISONS
from corrdit.benchmark.floors import Ceilings
from corrdit.benchmark.runner import LEAST_ROUNDS, Piece, Settings, refusal

# Of a GPU: float64 is this share of the products of 16 bits, and a map of scores in float64 is passed over so often.
_DOUBLE, _PASSES = 0.08, 6
# What triton takes for the kernels of a piece at the first shape of a head_dim and at another one, where only numbers
# that divide otherwise compile again; and how many times the floor our calls and others are thought to take.
_FIRST_SHAPE_SECONDS, _NEXT_SHAPE_SECONDS, _OWN, _OTHERS = 10.0, 3.0, 1.5, 10.0
# Calls of a way beside timed ones: the check, the warm-up, the one for its memory.
_UNTIMED = 3


class Estimate(NamedTuple):
    """Seconds of all, and how often a compiler runs for another way."""

    seconds: float
    compilations: int


def estimate(todo: Sequence[Piece], settings: Settings, ceilings: Ceilings) -> Estimate:
    """Of the checks against float64, compilers and calls; a way that is not tried takes nothing."""
    seconds, compilations = 0.0, 0
    compiled: set[tuple[str, bool, int]] = set()
    for piece in todo:
        floor = piece.floor(ceilings, settings.dtype).milliseconds / 1e3
        seconds += _truth_seconds(piece, settings, ceilings) + len(settings.backends) * _calls(floor * _OWN, settings)
        kernels = (piece.operation, piece.backward, piece.shape.head_dim)
        if settings.device.type == "cuda":
            seconds += _NEXT_SHAPE_SECONDS if kernels in compiled else _FIRST_SHAPE_SECONDS
            compiled.add(kernels)
        for name in piece.baselines(settings):
            baseline = COMPARISONS[piece.operation].baselines[name]
            if refusal(baseline, piece, settings) is None:
                seconds += baseline.compile_seconds + _calls(floor * _OTHERS, settings)
                compilations += baseline.compile_seconds > 0
    return Estimate(seconds, compilations)


def _calls(seconds: float, settings: Settings) -> float:
    """What all calls of a way take, each of so many seconds."""
    rounds = max(min(LEAST_ROUNDS, settings.rounds), min(settings.rounds, int(settings.seconds / seconds)))
    return (_UNTIMED + rounds) * seconds


def _truth_seconds(piece: Piece, settings: Settings, ceilings: Ceilings) -> float:
    shape = piece.shape
    share = (min(settings.checked_frames or shape.frames, shape.frames) / shape.frames) ** 2
    products = share * COMPARISONS[piece.operation].work(shape, piece.backward).products
    map_bytes = 8 * _PASSES * products / (2 * shape.head_dim)
    return products / (_DOUBLE * ceilings.matmul_tflops * 1e12) + map_bytes / (ceilings.copy_gigabytes * 1e9)
