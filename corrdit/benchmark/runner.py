"""Runs comparisons: correctness first, then memory, then times in turns; one row for each competitor and pass."""

from __future__ import annotations

import dataclasses
import gc
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from corrdit.benchmark import checking
from corrdit.benchmark.comparisons import COMPARISONS, Baseline, Results, Scene
from corrdit.benchmark.environment import environment
from corrdit.benchmark.floors import Ceilings, Floor, floor_of
from corrdit.benchmark.measure import Call, peak_extra_bytes, replay, time_interleaved
from corrdit.benchmark.predictions import predicted_milliseconds
from corrdit.benchmark.shapes import SHAPES, Shape
from corrdit.files import parsed_json
from corrdit.memory import is_out_of_memory, leaves_device_unusable
from corrdit.ops.backends import backend_name

Row = dict[str, Any]
FORWARD, BOTH = "forward", "forward and backward"
LEAST_ROUNDS = 3
_REPLAY = ", replayed"
RESULTS_FILE = "results.json"


class DeviceLost(RuntimeError):
    """This process cannot go on measuring on its device."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        backends: our own competitors, as `backend=` of the operations.
        baselines: names of the other ways that are timed as well.
        rounds: timed calls of each competitor, at most.
        seconds: timed calls of a competitor end after about this long, but not before `LEAST_ROUNDS`.
        baseline_bytes: baselines that need more than this for their score maps are left out, with the reason in their
            row; None tries them all.
        compiled_at: the name of the one shape at which other ways that compile something are timed; None for all.
        checked_frames: frames on which results are compared with float64; None for all.
        commit: what stands in the rows as the commit; None finds it out.
    """

    device: torch.device
    dtype: torch.dtype
    backends: tuple[str, ...] = ("auto",)
    baselines: tuple[str, ...] = ()
    rounds: int = 7
    seconds: float = 10.0
    baseline_bytes: float | None = None
    compiled_at: str | None = None
    checked_frames: int | None = None
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is measured together: one operation and pass over one shape, by all competitors."""

    operation: str
    shape: Shape
    backward: bool

    @property
    def passes(self) -> str:
        return BOTH if self.backward else FORWARD

    def competitors(self, settings: Settings) -> list[str]:
        """Names as they stand in rows, ours first."""
        return [f"corrdit {backend}" for backend in settings.backends] + self.baselines(settings)

    def baselines(self, settings: Settings) -> list[str]:
        """Names of the other ways."""
        known, compiled_at = COMPARISONS[self.operation].baselines, settings.compiled_at
        every = compiled_at in (None, self.shape.name)
        return [name for name in known if name in settings.baselines and (every or not known[name].compile_seconds)]

    def floor(self, ceilings: Ceilings, dtype: torch.dtype) -> Floor:
        return floor_of(COMPARISONS[self.operation].work(self.shape, self.backward), ceilings, dtype.itemsize)


def pieces(operations: Sequence[str], shapes: Sequence[Shape]) -> list[Piece]:
    """All of them, shape by shape; operations without gradients have no backward pass."""
    return [
        Piece(operation, shape, backward)
        for shape in shapes
        for operation in operations
        for backward in ((False, True) if COMPARISONS[operation].backward else (False,))
    ]


def surroundings(settings: Settings) -> Row:
    """What every row says of the machine; rows that differ in it are not of the same measurement."""
    dtype = str(settings.dtype).removeprefix("torch.")
    commit = {} if settings.commit is None else {"commit": settings.commit}
    return {**environment(settings.device), **commit, "dtype": dtype}


def run_piece(
    piece: Piece, settings: Settings, ceilings: Ceilings, where: Row, competitors: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of one piece, of all competitors or some.

    A competitor that is wrong, has no memory or fails has a row without times that says so.

    Raises:
        DeviceLost: a call left the device unusable; its row, alone, has been given.
    """
    names = piece.competitors(settings) if competitors is None else competitors
    measurement = _Measurement(piece, settings)
    rows = {}
    for name in names:
        rows[name] = measurement.attempt(name)
        if measurement.broken is not None:
            break
    else:
        measurement.time({name: row for name, row in rows.items() if "left_out" not in row})
    if measurement.broken is not None:
        # The others are another process's to measure.
        rows = {name: row for name, row in rows.items() if name == measurement.broken}
    floor = piece.floor(ceilings, settings.dtype)
    for name, row in rows.items():
        if "milliseconds" in row:
            row["share_of_limit"] = floor.milliseconds / row["milliseconds"]["median"]
            if row.get("about") == "triton":
                row["predicted_milliseconds"] = predicted_milliseconds(
                    piece.operation, piece.passes, piece.shape.name, where["device"], where["dtype"]
                )
        yield {
            "operation": piece.operation,
            "pass": piece.passes,
            "competitor": name,
            **row,
            "floor_milliseconds": floor.milliseconds,
            "bound": floor.bound,
            "shape": dataclasses.asdict(piece.shape),
            **where,
            **dataclasses.asdict(ceilings),
            "load": os.getloadavg()[0],
        }
    if measurement.broken is not None:
        raise DeviceLost(
            f"the device is unusable after {piece.operation}, {piece.shape.name}, {measurement.broken}; "
            "another process has to go on"
        )


def refusal(baseline: Baseline, piece: Piece, settings: Settings) -> tuple[str, str] | None:
    """Why another way is not even tried: the status and the reason of its row."""
    kind = settings.device.type
    if reason := baseline.missing(kind):
        return "not possible", reason
    if piece.backward and baseline.forward_only_on == kind:
        return "not possible", f"has no backward pass on {kind}"
    needed, allowed = baseline.map_bytes(piece.shape, settings.dtype.itemsize), settings.baseline_bytes
    if allowed is not None and needed > allowed:
        return (
            "out of memory",
            f"needs {needed / 2**30:.1f} GiB for its score maps, more than {allowed / 2**30:.1f} GiB",
        )
    return None


class _Measurement:
    """One piece under way.

    Attributes:
        broken: after which competitor the device cannot be used any more; None while it can.
    """

    def __init__(self, piece: Piece, settings: Settings) -> None:
        self.comparison = COMPARISONS[piece.operation]
        self.piece, self.settings = piece, settings
        self.broken: str | None = None
        self._works: dict[str, Call] = {}
        self._rounds: dict[str, int] = {}
        self._scene: Scene | None = None
        self._truth: checking.Truth | None = None

    def attempt(self, name: str) -> Row:
        """Checks a competitor, calls it once to warm up and once more for its memory."""
        baseline = None if name.startswith("corrdit ") else self.comparison.baselines[name]
        reason = None if baseline is None else refusal(baseline, self.piece, self.settings)
        if reason is not None:
            return _left_out(*reason)
        backend = name.removeprefix("corrdit ")
        run = baseline.run if baseline is not None else lambda scene: self.comparison.run(scene, backend)
        row: Row = {}
        try:
            row.update(self._check(run))
            if not row["within_tolerance"]:
                return {**row, **_left_out("wrong", "the result is wrong, so it has no time")}
            scene = self._scene_to_time()
            if baseline is None:
                row["about"] = backend_name(backend, scene.q)  # what "auto" stands for
            elif baseline.about is not None:
                row["about"] = baseline.about(scene)
            work = checking.work(run, scene, self.piece.backward)
            if self.settings.device.type == "cuda" or (baseline is not None and baseline.compile_seconds > 0):
                work()
            start = time.perf_counter()
            row["extra_bytes"] = peak_extra_bytes(work, self.settings.device)
            seconds, most = max(time.perf_counter() - start, 1e-6), self.settings.rounds
            self._rounds[name] = max(min(LEAST_ROUNDS, most), min(most, int(self.settings.seconds / seconds)))
            self._works[name] = work
        except Exception as error:  # whatever a competitor dies of is a result, and the others go on
            return {**row, **self._failure(name, error)}
        if row.get("about") == "triton":
            self._capture(name, work, row)
        return row

    def _capture(self, name: str, work: Call, row: Row) -> None:
        """Has a call timed as a replayed graph as well; a call that cannot be captured keeps its own time."""
        try:
            replayed = replay(work, self.settings.device)
        except Exception as error:
            row["replay_left_out"] = self._failure(name, error)["left_out"]
            return
        if replayed is not None:
            self._works[name + _REPLAY] = replayed
            self._rounds[name + _REPLAY] = self._rounds[name]

    def time(self, rows: dict[str, Row]) -> None:
        """Adds the times of all competitors that work to their rows."""
        times, failures = time_interleaved(self._works, self.settings.device, self._rounds)
        for name, row in rows.items():
            if name in failures:
                row.update(self._failure(name, failures[name]))
            else:
                row["milliseconds"] = dataclasses.asdict(times[name])
            if name + _REPLAY in times:
                row["replay_milliseconds"] = times[name + _REPLAY].median
            elif name + _REPLAY in failures:
                row["replay_left_out"] = self._failure(name, failures[name + _REPLAY])["left_out"]

    def _scene_to_time(self) -> Scene:
        assert self._truth is not None, "results are checked before they are timed"
        if self._truth.inputs.grid == self.piece.shape.grid:
            return self._truth.inputs
        if self._scene is None:
            self._scene = checking.scene(
                self.piece.shape, self.piece.shape.grid, self.settings.device, self.settings.dtype, self.piece.backward
            )
        return self._scene

    def _check(self, run: Callable[[Scene], Results]) -> Row:
        if self._truth is None:
            frames = self.settings.checked_frames or self.piece.shape.frames
            self._truth = checking.Truth.of(
                self.comparison,
                self.piece.shape,
                frames=min(frames, self.piece.shape.frames),
                backward=self.piece.backward,
                device=self.settings.device,
                dtype=self.settings.dtype,
            )
        return self._truth.compare(run)

    def _failure(self, name: str, error: Exception) -> Row:
        status, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if is_out_of_memory(error):
            wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
            status, reason = "out of memory", "out of memory" + (f": wanted {wanted.group(1)} more" if wanted else "")
        elif leaves_device_unusable(error):
            self.broken = self.broken or name
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None  # it holds the tensors of the call
            cause = cause.__cause__ or cause.__context__
        gc.collect()
        if self.settings.device.type == "cuda" and self.broken is None:
            torch.cuda.empty_cache()
        return _left_out(status, reason)


def key_of(row: Row) -> tuple[str, str, str, str]:
    """Operation, shape, pass and competitor: what a row is about."""
    return row["operation"], row["shape"]["name"], row["pass"], row["competitor"]


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a file, none where it does not exist.

    Raises:
        ValueError: it is no file of results.
    """
    if not path.exists():
        return []
    try:
        rows: list[Row] = parsed_json(path.read_text(encoding="utf-8"))["rows"]
        for row in rows:
            key_of(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no rows that corrdit bench wrote ({type(error).__name__}: {error}); "
            "give another folder to --output"
        ) from error
    return rows


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows in place of old ones of the same key, in the order of shapes and operations."""
    rows = {key_of(row): row for row in [*old, *new]}
    order = (list(SHAPES), list(COMPARISONS), [FORWARD, BOTH])

    def place(row: Row) -> list[int]:
        names = (row["shape"]["name"], row["operation"], row["pass"])
        return [known.index(name) if name in known else len(known) for name, known in zip(names, order, strict=True)]

    return sorted(rows.values(), key=place)


def missing(piece: Piece, settings: Settings, rows: Sequence[Row], where: Row) -> list[str]:
    """Competitors of a piece without a row that was measured in the same surroundings: commit, device, versions."""
    measured = {key_of(row) for row in rows if all(row.get(name) == value for name, value in where.items())}
    about = (piece.operation, piece.shape.name, piece.passes)
    return [name for name in piece.competitors(settings) if (*about, name) not in measured]


def failed_rows(rows: Sequence[Row]) -> list[Row]:
    """Our own rows without a time."""
    return [row for row in rows if row["competitor"].startswith("corrdit ") and "left_out" in row]


def _left_out(status: str, reason: str) -> Row:
    return {"status": status, "left_out": reason}
