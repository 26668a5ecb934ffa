"""The numbers of an analysis: counts and sums for every step, layer and reading, which add up over videos."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from corrdit.analysis.counts import AttentionSums, MatchCounts
from corrdit.analysis.protocols import FEATURE_READINGS
from corrdit.arguments import choice
from corrdit.array_files import read_arrays, write_arrays

MEAN = "query-key mean"
STANDING_STILL = "standing still"
_ARRAYS = {
    "hits": ("reading", "threshold"),
    "moving_hits": ("reading", "threshold"),
    "cases": ("reading",),
    "moving_cases": ("reading",),
    "confidence": ("head",),
    "confidence_cases": (),
    "confidence_text": ("head",),
    "confidence_own": ("head",),
    "point_cases": (),
    "text": ("head",),
    "own": ("head",),
    "cross": ("head",),
    "attention_cases": (),
}
PARTS = ("text", "own", "cross")
"""Where attention goes: to the text, to the frame of the point, to the other frames."""
_CASES = {
    ("hits",): "cases",
    ("moving_hits",): "moving_cases",
    ("confidence",): "confidence_cases",
    ("confidence_text", "confidence_own"): "point_cases",
    ("text", "own", "cross"): "attention_cases",
}
"""What is summed, and over how many cases."""
_LATER: np.ndarray = None  # type: ignore[assignment]
"""Stands for zeros, whose shape follows from the other fields."""


@dataclass(frozen=True, eq=False)
class AnalysisTable:
    """Counts and sums over S steps, L layers, R readings, K thresholds and M = 1 + H (the mean over heads, each head).

    Args:
        steps, layers: indices of the rows and columns.
        timesteps: of the steps, as the scheduler counts them.
        heads: number of heads read by themselves; 0 for the mean alone.
        features: whether intermediate features were matched.
        thresholds: in pixels of the encoded frames.
        stride: (dy, dx) pixels a token spans.
        low_pass: standard deviations in tokens of the filters the mean over heads was also read through.
        of_videos: whether the cases are videos: a sum of `video_means`.
        videos: how many videos are in the sums.
        hits, moving_hits: int64 `[S, L, R, K]`; cases, moving_cases: int64 `[S, L, R]`.
        confidence, confidence_text, confidence_own, text, own, cross: float64 `[S, L, M]`; confidence_cases,
            point_cases (of the confidence in the text and the own frame), attention_cases: int64 `[S, L]`.

    Raises:
        ValueError: arrays of other shapes.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    timesteps: tuple[float, ...]
    heads: int
    features: bool
    thresholds: tuple[float, ...]
    stride: tuple[int, int]
    low_pass: tuple[float, ...] = ()
    of_videos: bool = False
    videos: int = 1
    hits: np.ndarray = _LATER
    moving_hits: np.ndarray = _LATER
    cases: np.ndarray = _LATER
    moving_cases: np.ndarray = _LATER
    confidence: np.ndarray = _LATER
    confidence_cases: np.ndarray = _LATER
    confidence_text: np.ndarray = _LATER
    confidence_own: np.ndarray = _LATER
    point_cases: np.ndarray = _LATER
    text: np.ndarray = _LATER
    own: np.ndarray = _LATER
    cross: np.ndarray = _LATER
    attention_cases: np.ndarray = _LATER

    def __post_init__(self) -> None:
        sizes = {"reading": len(self.readings), "threshold": len(self.thresholds), "head": 1 + self.heads}
        for name, axes in _ARRAYS.items():
            shape = (len(self.steps), len(self.layers), *(sizes[axis] for axis in axes))
            value = getattr(self, name)
            if value is _LATER:
                whole = "head" not in axes
                object.__setattr__(self, name, np.zeros(shape, np.int64 if whole else np.float64))
            elif value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {value.shape}")

    @property
    def readings(self) -> tuple[str, ...]:
        """Names of the R readings: mean over heads, each head, the mean filtered, features, points that never move."""
        single = tuple(f"query-key head {head}" for head in range(self.heads))
        filtered = tuple(f"query-key low-pass {spread:g}" for spread in self.low_pass)
        return (MEAN, *single, *filtered, *(FEATURE_READINGS if self.features else ()), STANDING_STILL)

    @property
    def key(self) -> tuple[object, ...]:
        """What two tables must share to be added up."""
        names = ("steps", "layers", "timesteps", "heads", "features", "thresholds", "stride", "low_pass", "of_videos")
        return tuple(getattr(self, name) for name in names)

    def put_matches(self, step: int, layer: int, first: int, counts: MatchCounts) -> None:
        """Enter the counts of consecutive readings, from reading number `first`; step and layer by their indices."""
        place = (self.steps.index(step), self.layers.index(layer), slice(first, first + len(counts.hits)))
        self.hits[place], self.moving_hits[place] = counts.hits, counts.moving_hits
        self.cases[place], self.moving_cases[place] = counts.cases, counts.moving_cases

    def put_still(self, counts: MatchCounts) -> None:
        """Enter the counts of points that never move, the same for all steps and layers."""
        self.hits[..., -1, :], self.moving_hits[..., -1, :] = counts.hits[0], counts.moving_hits[0]
        self.cases[..., -1], self.moving_cases[..., -1] = counts.cases, counts.moving_cases

    def put_attention(self, step: int, layer: int, sums: AttentionSums) -> None:
        """Enter the attention of a step and layer."""
        place = (self.steps.index(step), self.layers.index(layer))
        for name, value in zip(sums._fields, sums, strict=True):
            getattr(self, name)[place] = value

    def __add__(self, other: AnalysisTable) -> AnalysisTable:
        if self.key != other.key:
            raise ValueError(
                "analyses of different steps, layers, heads, thresholds, token sizes or cases do not add up: "
                f"{self.key} and {other.key}"
            )
        summed = {name: getattr(self, name) + getattr(other, name) for name in _ARRAYS}
        return replace(self, videos=self.videos + other.videos, **summed)

    def video_means(self) -> AnalysisTable:
        """Of one video, its own figures as one case each, so that a sum over videos gives their mean."""
        shares: dict[str, Any] = {}
        for amounts, counted in _CASES.items():
            cases = getattr(self, counted)
            for name in amounts:
                values = getattr(self, name)
                shares[name] = np.nan_to_num(_share(values, cases))
            shares[counted] = (cases > 0).astype(np.int64)
        return replace(self, of_videos=True, **shares)

    def accuracy(self, threshold: float | None = None, *, moving: bool = False) -> np.ndarray:
        """Share of matches within a threshold (pixels; None for the main one), `[S, L, R]`; NaN without cases."""
        place = self.thresholds.index(self.main_threshold if threshold is None else threshold)
        hits, cases = (self.moving_hits, self.moving_cases) if moving else (self.hits, self.cases)
        return _share(hits[..., place], cases)

    @property
    def main_threshold(self) -> float:
        """The threshold nearest to one token, in pixels."""
        return min(self.thresholds, key=lambda threshold: abs(threshold - min(self.stride)))

    def confidence_score(self, part: str = "cross") -> np.ndarray:
        """Mean largest weight in the "text", in the "own" (first) frame, or in a later frame where the point is visible
        ("cross"), `[S, L, M]`.
        """
        if choice("part", part, PARTS) == "cross":
            return _share(self.confidence, self.confidence_cases)
        peaks = self.confidence_text if part == "text" else self.confidence_own
        return _share(peaks, self.point_cases)

    def attention_score(self, part: str = "cross") -> np.ndarray:
        """Mean weight on the "text", the "own" (first) frame or the other frames ("cross"), `[S, L, M]`."""
        values = getattr(self, choice("part", part, PARTS))
        return _share(values, self.attention_cases)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, beside and then renamed."""
        facts = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _ARRAYS}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        write_arrays(path, {"facts": np.array(json.dumps(facts)), **arrays})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AnalysisTable:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another file.
        """
        what = "the result of an analysis"
        arrays = read_arrays(path, ("facts", *_ARRAYS), what=what)
        try:
            facts = json.loads(str(arrays.pop("facts")))
            facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
            return cls(**{**facts, **arrays})
        except (ValueError, TypeError, AttributeError) as error:  # facts that are none, or others
            raise ValueError(f"{os.fspath(path)} is not {what}: {error}") from error


def total(tables: Iterable[AnalysisTable]) -> AnalysisTable:
    """The sum over videos.

    Raises:
        ValueError: no table, or tables that do not add up.
    """
    summed: AnalysisTable | None = None
    for table in tables:
        summed = table if summed is None else summed + table
    if summed is None:
        raise ValueError("there is no result to sum up; every video failed or none was analysed")
    return summed


def _share(amount: np.ndarray, cases: np.ndarray) -> np.ndarray:
    """Amounts by cases, which may lack the last axes; NaN without cases."""
    cases = np.broadcast_to(cases.reshape(cases.shape + (1,) * (amount.ndim - cases.ndim)), amount.shape)
    return np.divide(amount, cases, out=np.full(amount.shape, np.nan), where=cases > 0)
