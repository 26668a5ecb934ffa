"""Choosing the layer, step and head of a backbone from an analysis, as a preset."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from corrdit.analysis.table import AnalysisTable, total
from corrdit.files import written_beside

DRAWS = 2000
FEW_VIDEOS = 5
GUIDANCE_LAYERS = 3
Place = tuple[int, int, int]
"""Indices of a step, a layer and a reading in a table."""
Counts = dict[Place, tuple[np.ndarray, np.ndarray]]
"""Hits and cases, each float64 `[V]` over videos; shares and ones where every video counts the same."""


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
        videos: how many videos it rests on: those with cases of `best`.
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
        among = f"{100 * self.best.low:.1f} to {100 * self.best.high:.1f} %, {self.videos} videos"
        if self.videos == 1:
            among = "of one video, so without an interval"
        return (
            f"layer {self.best.layer}, {head}, step {self.best.step} (timestep {self.best.timestep:g}): "
            f"{100 * self.best.accuracy:.1f} % of {kind} found within {self.threshold:g} px "
            f"({among})"
        )


def calibrate(
    tables: Collection[AnalysisTable], *, summed: AnalysisTable | None = None, threshold: float | None = None
) -> Calibration:
    """The layer, step and head whose query-key matches are right most often.

    Points that moved are counted where there are any. A single head is taken in place of the mean over heads only
    where it is better in 97.5 % of resamplings of the videos: of many heads the best looks better than it is.

    Args:
        tables: of several videos; gone through one after another, so that they may be read as they come.
        summed: their sum, where it is known.
        threshold: in pixels of the encoded frames; None for the one nearest to a token.

    Raises:
        ValueError: no table, tables that do not add up, an unknown threshold, no case at all.
    """
    summed = total(tables) if summed is None else summed
    threshold = summed.main_threshold if threshold is None else float(threshold)
    if threshold not in summed.thresholds:
        accepted = ", ".join(f"{value:g}" for value in summed.thresholds)
        raise ValueError(f"threshold {threshold:g} was not measured; accepted are {accepted} pixels")
    moving = bool(summed.moving_cases.any())
    accuracy = summed.accuracy(threshold, moving=moving)[..., : 1 + summed.heads]
    if not np.isfinite(accuracy).any():
        raise ValueError("no point is visible in any later frame, so nothing can be chosen")
    of_mean = _best_place(accuracy, 0, 1)
    of_head = _best_place(accuracy, 1, 1 + summed.heads) if summed.heads else None
    filtered = [(*of_mean[:2], 1 + summed.heads + index) for index in range(len(summed.low_pass))]
    places = [of_mean, *([of_head] if of_head else []), *filtered]
    counts = _counts(tables, places, threshold, moving)
    mean = _choice(summed, accuracy, counts, of_mean)
    best, single, place = mean, None, of_mean
    if of_head is not None:
        single = _choice(summed, accuracy, counts, of_head)
        if _surely_better(counts, of_head, of_mean):
            best, place = single, of_head
    at = summed.steps.index(best.step)
    order = np.argsort(-np.nan_to_num(accuracy[at, :, 0], nan=-1.0), kind="stable")
    layers = tuple(summed.layers[index] for index in order)
    contributing = int((counts[place][1] > 0).sum())
    low_pass = 0.0 if best.head is not None else _low_pass(summed, counts, of_mean, filtered)
    return Calibration(best, mean, single, layers, threshold, moving, contributing, low_pass)


def preset_values(calibration: Calibration, settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of a preset.json: what `corrdit.integrations.diffusers.Preset` reads, and figures for people.

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
    replaced = ("tracking", "guidance", "guidance_layers", "head_weights")
    before = {name: value for name, value in settings.get("preset", {}).items() if value is not None}
    kept = {name: value for name, value in before.items() if name not in replaced}
    if "transfer" in kept:
        kept["transfer"] = {**kept["transfer"], "blocks": [best.layer]}
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
        "guidance": {**before.get("guidance", {}), "layers": list(calibration.layers[:GUIDANCE_LAYERS])},
        "layers_by_accuracy": list(calibration.layers),
    }
    tracking: dict[str, float | str] = {"low_pass": calibration.low_pass} if calibration.low_pass else {}
    if options.get("noise") == "inverted":
        tracking["inversion"] = "ddim"
    if tracking:
        chosen["tracking"] = tracking
    if options.get("tokens_per_frame"):
        chosen["tokens_per_frame"] = options["tokens_per_frame"]
    return {**kept, **chosen}


def write_preset(path: str | os.PathLike[str], values: Mapping[str, object]) -> None:
    """Write a preset.json, beside and then renamed."""
    with written_beside(path, "w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def interval(hits: np.ndarray, cases: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a share over videos: hits `[V]` out of cases `[V]`, by resampling whole videos with cases."""
    low, high = np.quantile(_resampled(hits, cases, seed), [0.025, 0.975])
    return float(low), float(high)


def _counts(tables: Iterable[AnalysisTable], places: Sequence[Place], threshold: float, moving: bool) -> Counts:
    """Hits and cases of every video at some readings, so that no more than one table is held at a time."""
    found = []
    for table in tables:
        at = table.thresholds.index(threshold)
        hits, cases = (table.moving_hits, table.moving_cases) if moving else (table.hits, table.cases)
        found.append([(hits[(*place, at)], cases[place]) for place in places])
    videos = np.array(found, dtype=np.float64).reshape(len(found), len(places), 2)
    return {place: (videos[:, n, 0], videos[:, n, 1]) for n, place in enumerate(places)}


def _best_place(accuracy: np.ndarray, first: int, end: int) -> Place:
    part = np.nan_to_num(accuracy[..., first:end], nan=-1.0)
    s, n, r = np.unravel_index(part.argmax(), part.shape)
    return int(s), int(n), first + int(r)


def _choice(table: AnalysisTable, accuracy: np.ndarray, counts: Counts, place: Place) -> Choice:
    low, high = interval(*counts[place])
    return Choice(
        layer=table.layers[place[1]],
        step=table.steps[place[0]],
        timestep=table.timesteps[place[0]],
        head=None if place[2] == 0 else place[2] - 1,
        accuracy=float(accuracy[place]),
        low=low,
        high=high,
    )


def _low_pass(table: AnalysisTable, counts: Counts, plain: Place, filtered: list[Place]) -> float:
    """The filter that matches best at the chosen layer and step, if it is surely better than none; else 0."""
    if not filtered:
        return 0.0
    found = max(filtered, key=lambda place: counts[place][0].sum())
    return table.low_pass[filtered.index(found)] if _surely_better(counts, found, plain) else 0.0


def _surely_better(counts: Counts, one: Place, other: Place) -> bool:
    """Whether one reading beats another in 97.5 % of resamplings of the videos, the same ones for both.

    Never with a single video: every resampling of it is itself.
    """
    if (counts[one][1] > 0).sum() < 2:
        return False
    first, second = (_resampled(*counts[place], 0) for place in (one, other))
    return bool(np.quantile(first - second, 0.025) > 0)


def _resampled(hits: np.ndarray, cases: np.ndarray, seed: int) -> np.ndarray:
    hits, cases = hits[cases > 0], cases[cases > 0]
    chosen = np.random.default_rng(seed).integers(len(hits), size=(DRAWS, len(hits)))
    return hits[chosen].sum(1) / cases[chosen].sum(1)
