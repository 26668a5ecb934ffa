"""Choosing the layer, step and head of a backbone from an analysis, as a preset."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corrdit.analysis.table import AnalysisTable, total
from corrdit.files import written_beside

DRAWS = 2000
FEW_VIDEOS = 5
GUIDANCE_LAYERS = 3


@dataclass(frozen=True)
class Choice:
    """A reading of one layer at one step, and how well it matches.

    Args:
        layer, step, timestep: where.
        head: a single head; None for the mean over heads.
        accuracy: share of matches within the threshold.
        low, high: 95 % interval over videos.
    """

    layer: int
    step: int
    timestep: float
    head: int | None
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """What an analysis recommends.

    Args:
        best: the reading to use.
        mean, single: the best mean over heads, and the best single head (None where heads were not read apart).
        layers: layers by the accuracy of their mean over heads at the step of `best`, the best first.
        threshold: in pixels of the encoded frames.
        moving: whether only points that moved were counted; False where there were none.
        videos: how many videos it rests on.
        low_pass: standard deviation in tokens of the filter on queries and keys that is surely better than none for
            `best`; 0 where none is, or where `best` is a single head.
    """

    best: Choice
    mean: Choice
    single: Choice | None
    layers: tuple[int, ...]
    threshold: float
    moving: bool
    videos: int
    low_pass: float = 0.0

    def described(self) -> str:
        """The choice in one sentence."""
        head = "mean over heads" if self.best.head is None else f"head {self.best.head}"
        if self.low_pass:
            head += f" (better with a low-pass filter of {self.low_pass:g} tokens)"
        kind = "visible points that moved" if self.moving else "visible points"
        return (
            f"layer {self.best.layer}, {head}, step {self.best.step} (timestep {self.best.timestep:g}): "
            f"{100 * self.best.accuracy:.1f} % of {kind} within {self.threshold:g} px "
            f"({100 * self.best.low:.1f} to {100 * self.best.high:.1f} %, {self.videos} videos)"
        )


def calibrate(tables: Sequence[AnalysisTable], *, threshold: float | None = None) -> Calibration:
    """The layer, step and head whose query-key matches are right most often.

    Points that moved are counted where there are any. A single head is taken in place of the mean over heads only
    where it is better in 97.5 % of resamplings of the videos: of many heads the best looks better than it is.

    Args:
        tables: of several videos.
        threshold: in pixels of the encoded frames; None for the one nearest to a token.

    Raises:
        ValueError: no table, tables that do not add up, an unknown threshold, no case at all.
    """
    summed = total(tables)
    threshold = summed.main_threshold if threshold is None else float(threshold)
    if threshold not in summed.thresholds:
        accepted = ", ".join(f"{value:g}" for value in summed.thresholds)
        raise ValueError(f"threshold {threshold:g} was not measured; accepted are {accepted} pixels")
    moving = bool(summed.moving_cases.any())
    accuracy = summed.accuracy(threshold, moving=moving)[..., : 1 + summed.heads]
    if not np.isfinite(accuracy).any():
        raise ValueError("no point is visible in any later frame, so nothing can be chosen")
    counts = [_counts(table, threshold, moving) for table in tables]
    mean = _choice(summed, accuracy, counts, 0, 1)
    best, single = mean, None
    if summed.heads:
        single = _choice(summed, accuracy, counts, 1, 1 + summed.heads)
        if _surely_better(counts, _place(summed, single), _place(summed, mean)):
            best = single
    at = summed.steps.index(best.step)
    order = np.argsort(-np.nan_to_num(accuracy[at, :, 0], nan=-1.0), kind="stable")
    layers = tuple(summed.layers[index] for index in order)
    low_pass = 0.0 if best.head is not None else _low_pass(summed, counts, best)
    return Calibration(best, mean, single, layers, threshold, moving, len(tables), low_pass)


def preset_values(calibration: Calibration, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of a preset.json: what `corrdit.Preset` reads, and figures for people.

    Args:
        calibration: the choice.
        settings: of the analysis; its options say the schedule, the noise and the size of frames, and what an analysis
            does not choose is kept from `preset`, the one the backbone had.

    Raises:
        ValueError: settings without the length of the schedule.
    """
    best, options = calibration.best, settings.get("options", {})
    inference_steps = options.get("inference_steps")
    if not inference_steps:
        raise ValueError("the settings of the analysis do not say how many inference steps it counts in")
    # The tracker's options and the weights of heads belong to the layers they were chosen for, not to these.
    of_before = settings.get("preset", {}).items()
    kept = {name: value for name, value in of_before if value is not None and name not in ("tracking", "head_weights")}
    chosen = {
        "layer": best.layer,
        "step": -1 if best.step == inference_steps - 1 else best.step,
        "inference_steps": inference_steps,
        "heads": "probabilities",
        "head": best.head,
        "head_weights": None,
        "noise": options.get("noise") == "noised",
        "source": f"calibrated: {calibration.described()}",
        "timestep": best.timestep,
        "guidance_layers": list(calibration.layers[:GUIDANCE_LAYERS]),
        "layers_by_accuracy": list(calibration.layers),
    }
    tracking: dict[str, Any] = {"low_pass": calibration.low_pass} if calibration.low_pass else {}
    if options.get("noise") == "inverted":
        tracking["inversion"] = "ddim"
    if tracking:
        chosen["tracking"] = tracking
    if options.get("tokens_per_frame"):
        chosen["tokens_per_frame"] = options["tokens_per_frame"]
    return {**kept, **chosen}


def write_preset(path: str | os.PathLike[str], values: dict[str, Any]) -> None:
    """Write a preset.json, beside and then renamed."""
    with written_beside(path, "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def interval(hits: np.ndarray, cases: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a share over videos: hits `[V]` out of cases `[V]`, by resampling whole videos with cases."""
    low, high = np.quantile(_resampled(hits, cases, seed), [0.025, 0.975])
    return float(low), float(high)


def _counts(table: AnalysisTable, threshold: float, moving: bool) -> tuple[np.ndarray, np.ndarray]:
    place = table.thresholds.index(threshold)
    if moving:
        return table.moving_hits[..., place], table.moving_cases
    return table.hits[..., place], table.cases


def _choice(
    table: AnalysisTable, accuracy: np.ndarray, counts: list[tuple[np.ndarray, np.ndarray]], first: int, end: int
) -> Choice:
    part = np.nan_to_num(accuracy[..., first:end], nan=-1.0)
    s, n, r = np.unravel_index(part.argmax(), part.shape)
    place = (int(s), int(n), first + int(r))
    hits, cases = (np.array([pair[kind][place] for pair in counts]) for kind in (0, 1))
    return Choice(
        layer=table.layers[n],
        step=table.steps[s],
        timestep=table.timesteps[s],
        head=None if place[2] == 0 else place[2] - 1,
        accuracy=float(accuracy[place]),
        low=interval(hits, cases)[0],
        high=interval(hits, cases)[1],
    )


def _low_pass(table: AnalysisTable, counts: list[tuple[np.ndarray, np.ndarray]], best: Choice) -> float:
    """The filter that matches best at the chosen layer and step, if it is surely better than none; else 0."""
    s, n, r = _place(table, best)
    places = [(s, n, 1 + table.heads + index) for index in range(len(table.low_pass))]
    if not places:
        return 0.0
    found = max(places, key=lambda place: sum(hits[place] for hits, _ in counts))
    return table.low_pass[places.index(found)] if _surely_better(counts, found, (s, n, r)) else 0.0


def _place(table: AnalysisTable, choice: Choice) -> tuple[int, int, int]:
    reading = 0 if choice.head is None else 1 + choice.head
    return table.steps.index(choice.step), table.layers.index(choice.layer), reading


def _surely_better(
    counts: list[tuple[np.ndarray, np.ndarray]], one: tuple[int, int, int], other: tuple[int, int, int]
) -> bool:
    """Whether one reading beats another in 97.5 % of resamplings of the videos, the same ones for both."""
    resampled = []
    for place in (one, other):
        hits, cases = (np.array([pair[kind][place] for pair in counts]) for kind in (0, 1))
        resampled.append(_resampled(hits, cases, 0))
    return bool(np.quantile(resampled[0] - resampled[1], 0.025) > 0)


def _resampled(hits: np.ndarray, cases: np.ndarray, seed: int) -> np.ndarray:
    hits, cases = hits[cases > 0], cases[cases > 0]
    chosen = np.random.default_rng(seed).integers(len(hits), size=(DRAWS, len(hits)))
    return hits[chosen].sum(1) / cases[chosen].sum(1)
