"""What `corrdit bench` does: chooses measurements, makes those that are missing, and shows and writes the rows."""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch

from corrdit.arguments import dtype_name
from corrdit.benchmark import measure, plots, runner
from corrdit.benchmark.comparisons import BASELINES, COMPARISONS
from corrdit.benchmark.environment import device_name
from corrdit.benchmark.floors import H200, Ceilings
from corrdit.benchmark.plan import estimate
from corrdit.benchmark.report import memory, milliseconds, percent, write_table
from corrdit.benchmark.runner import Piece, Row, Settings
from corrdit.benchmark.shapes import SHAPES, Shape, default_shapes
from corrdit.cli.devices import usable_devices
from corrdit.cli.terminal import print_table
from corrdit.files import write_json
from corrdit.ops.backends import BACKENDS

DTYPES = ("float32", "float16", "bfloat16")
SUCCESS, FAILED, UNFINISHED = 0, 1, 3
CHECKED_FRAMES_ON_CPU = 2
USABLE = 0.8
"""Of the memory that is free: what inputs, gradients and a baseline's maps may take."""


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Do what the arguments of `corrdit bench` ask; the exit status."""
    if "list" in (arguments.operations, arguments.baselines, arguments.shapes):
        return _print_names()
    output = _checked_output(arguments)
    if arguments.redraw:
        return _redraw(output)
    settings = _settings(arguments)
    todo, absent = _chosen_pieces(arguments, settings)
    if arguments.baselines == "default":
        settings = replace(settings, compiled_at=todo[0].shape.name)
    if arguments.plan:
        ceilings = H200 if absent else measure.measure_ceilings(settings.device, settings.dtype)
        _print_plan(todo, settings, ceilings, absent=absent)
        _print_estimate(todo, settings, ceilings, arguments.minutes)
        return SUCCESS
    return _measure(todo, settings, output, arguments)


def _measure(
    todo: Sequence[Piece], settings: Settings, output: pathlib.Path | None, arguments: argparse.Namespace
) -> int:
    start = time.monotonic()
    where = runner.surroundings(settings)
    rows = runner.read_rows(output / runner.RESULTS_FILE) if output is not None and arguments.resume else []
    left = {piece: names for piece in todo if (names := runner.missing(piece, settings, rows, where))}
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} measurements are in {output} already", flush=True)
    if left:
        ceilings = measure.measure_ceilings(settings.device, settings.dtype)
        _print_plan(list(left), settings, ceilings)
        _print_estimate(list(left), settings, ceilings, arguments.minutes)
    unfinished = len(left)
    for piece, names in left.items():
        if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
            break
        try:
            for row in _written(runner.run_piece(piece, settings, ceilings, where, names), rows, output):
                print(_line(row), flush=True)
        except runner.DeviceLost as error:
            print(f"corrdit bench: {error}", file=sys.stderr)
            break
        unfinished -= 1
    if output is not None and rows:
        _write_report(rows, output)
    return _status(rows, todo, unfinished)


def _written(new: Iterator[Row], rows: list[Row], output: pathlib.Path | None) -> Iterator[Row]:
    """Rows of a piece as they come; they are on the disk when the piece is over, or has left by an exception."""
    fresh = []
    try:
        for row in new:
            fresh.append(row)
            yield row
    finally:
        rows[:] = runner.merged(rows, fresh)
        if output is not None and fresh:
            write_json(output / runner.RESULTS_FILE, {"command": " ".join(["corrdit", *sys.argv[1:]]), "rows": rows})


def _status(rows: Sequence[Row], todo: Sequence[Piece], unfinished: int) -> int:
    asked = {(piece.operation, piece.shape.name) for piece in todo}
    failed = [row for row in runner.failed_rows(rows) if (row["operation"], row["shape"]["name"]) in asked]
    for row in failed:
        print(f"corrdit bench: {_line(row)}", file=sys.stderr)
    if unfinished:
        print(f"{unfinished} measurements are left: the same command with --resume goes on", flush=True)
        return UNFINISHED
    return FAILED if failed else SUCCESS


def _write_report(rows: Sequence[Row], output: pathlib.Path) -> None:
    for path in (output / runner.RESULTS_FILE, write_table(rows, output)):
        print(path, flush=True)
    if find_spec("matplotlib") is None:
        print(f"no pictures without matplotlib; where it is installed, --output {output} --redraw makes them")
        return
    for path in plots.write_plots(rows, output):
        print(path, flush=True)


def _redraw(output: pathlib.Path | None) -> int:
    rows = [] if output is None else runner.read_rows(output / runner.RESULTS_FILE)
    if output is None or not rows:
        raise ValueError(f"--redraw needs --output DIR with the {runner.RESULTS_FILE} of an earlier run, got {output}")
    _write_report(rows, output)
    return SUCCESS


def _checked_output(arguments: argparse.Namespace) -> pathlib.Path | None:
    """The folder, made if need be; its results are not overwritten unless they are to be resumed."""
    if arguments.output is None:
        if arguments.resume:
            raise ValueError("--resume goes on with the results of a folder; name it with --output DIR")
        return None
    output = pathlib.Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder, which is made if need be")
    if (output / runner.RESULTS_FILE).exists() and not (arguments.resume or arguments.redraw or arguments.plan):
        raise ValueError(
            f"{output / runner.RESULTS_FILE} is there already; add --resume to go on with it, or name another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise ValueError(f"--output {output} cannot be written; give a folder that can")
    return output


def _settings(arguments: argparse.Namespace) -> Settings:
    device = _device(arguments.device, planned=arguments.plan)
    dtype = dtype_name("--dtype", arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"), DTYPES)
    for option in ("minutes", "seconds", "baseline_gigabytes", "rounds", "check_frames"):
        value = getattr(arguments, option)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{option.replace('_', '-')} must be above 0, got {value}")
    baseline_bytes = None if device.type == "cuda" else USABLE * _free_bytes(device)
    if arguments.baseline_gigabytes is not None:
        baseline_bytes = arguments.baseline_gigabytes * 2**30
    return Settings(
        device=device,
        dtype=getattr(torch, dtype),
        backends=tuple(_names("backend", arguments.backends, dict.fromkeys(BACKENDS))),
        baselines=tuple(_names("baseline", arguments.baselines, BASELINES)),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        baseline_bytes=baseline_bytes,
        checked_frames=arguments.check_frames or (None if device.type == "cuda" else CHECKED_FRAMES_ON_CPU),
        commit=arguments.commit,
    )


def _device(name: str | None, *, planned: bool) -> torch.device:
    """A device that is here; a plan may be of one that is not."""
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device must be cuda or cpu, got {name!r}")
    index = device.index or 0
    if device.type == "cuda" and not planned and f"cuda:{index}" not in usable_devices(indexed=True):
        here = ", ".join(usable_devices())
        raise ValueError(f"--device {name}: there is no such CUDA device here; accepted are {here}")
    if device.type == "cuda" and cuda and index < torch.cuda.device_count():
        torch.cuda.set_device(index)
    return device


def _free_bytes(device: torch.device) -> float:
    """Memory that can be had on a device; infinite where nothing is known of it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else math.inf
    information = pathlib.Path("/proc/meminfo")
    lines = information.read_text(encoding="ascii").splitlines() if information.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * found[0] if found else math.inf


def _chosen_pieces(arguments: argparse.Namespace, settings: Settings) -> tuple[list[Piece], bool]:
    """What is to be measured, and whether that is the plan for a device that is not here."""
    absent = settings.device.type == "cuda" and not torch.cuda.is_available()
    default = arguments.shapes == "default"
    names = list(default_shapes(settings.device.type)) if default else _names("shape", arguments.shapes, SHAPES)
    free, fitting = USABLE * _free_bytes(settings.device), []
    for name in names:
        needed = _input_bytes(SHAPES[name], settings)
        if needed <= free:
            fitting.append(SHAPES[name])
            continue
        reason = f"needs {needed / 2**30:.1f} GiB for its inputs and their check, {free / 2**30:.1f} GiB are free"
        if not default:
            raise ValueError(f"--shapes {name} {reason} on {settings.device}; leave it out")
        print(f"{name} is left out: it {reason}", flush=True)
    operations = _names("operation", arguments.operations, COMPARISONS)
    return runner.pieces(operations, fitting), absent


def _input_bytes(shape: Shape, settings: Settings) -> float:
    """Of q, k, v, their gradients and the intermediate float32 of one, and of the same in float64 for the check."""
    checked = min(settings.checked_frames or shape.frames, shape.frames)
    share = (shape.text_tokens + checked * shape.height * shape.width) / shape.grid.tokens
    return float(shape.channels * shape.grid.tokens * (6 * settings.dtype.itemsize + 4 + 48 * share))


def _names(kind: str, names: str, known: Mapping[str, object]) -> list[str]:
    """Names separated by commas; all and, of baselines, none; an operation's name stands for all of its kinds."""
    if names == "all" or (names == "default" and kind == "baseline"):
        return list(known)
    if names == "none" and kind == "baseline":
        return []
    chosen: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        found = [full for full in known if name and name in (full, full.split(":")[0])]
        if not found:
            raise ValueError(f"--{kind}s: there is no {kind} {name!r}; there are {', '.join(known)}")
        chosen += [full for full in found if full not in chosen]
    return chosen


def _print_names() -> int:
    operations = [
        (name, runner.BOTH if comparison.backward else runner.FORWARD, ", ".join(comparison.baselines))
        for name, comparison in COMPARISONS.items()
    ]
    print_table(("operation", "passes", "baselines"), operations)
    print_table(("baseline", "what it is"), list(BASELINES.items()))
    print_table(("shape", "heads x head_dim, frames x rows x columns"), [(s.name, s.label) for s in SHAPES.values()])
    return SUCCESS


def _print_plan(todo: Sequence[Piece], settings: Settings, ceilings: Ceilings, *, absent: bool = False) -> None:
    """One line that says what is measured against which limits, and a table of the floors."""
    device = "a CUDA device that is not here, as if it were an H200" if absent else device_name(settings.device)
    others = max((len(piece.competitors(settings)) for piece in todo), default=1) - len(settings.backends)
    shapes = list(dict.fromkeys(piece.shape.name for piece in todo))
    dtype = str(settings.dtype).removeprefix("torch.")
    print(
        f"{len(todo)} measurements ({len({piece.operation for piece in todo})} operations, {len(shapes)} shapes) by "
        f"corrdit {' and '.join(settings.backends)} and up to {others} other ways, {dtype}, on {device}. Results are "
        f"compared with float64 first. Floors in milliseconds, from limits of {ceilings.label}:",
        flush=True,
    )
    floors = {piece: piece.floor(ceilings, settings.dtype) for piece in todo}
    lines = list(dict.fromkeys((piece.operation, piece.passes) for piece in todo))
    cells = []
    for line in lines:
        here = {piece.shape.name: floor for piece, floor in floors.items() if (piece.operation, piece.passes) == line}
        bounds = dict.fromkeys(floor.bound for floor in here.values())
        times = [milliseconds(here[name].milliseconds) if name in here else "" for name in shapes]
        cells.append((*line, " or ".join(bounds), *times))
    print_table(("operation", "pass", "bound by", *shapes), cells)


def _print_estimate(todo: Sequence[Piece], settings: Settings, ceilings: Ceilings, minutes: float | None) -> None:
    """About how long it takes, and whether that fits the minutes that are given."""
    needed = estimate(todo, settings, ceilings)
    fits = "" if minutes is None else f", {'within' if needed.seconds <= 60 * minutes else 'more than'} {minutes:g}"
    print(f"About {needed.seconds / 60:.0f} minutes{fits}; compilers run {needed.compilations} times for other ways")


def _line(row: Row) -> str:
    about = f" ({row['about']})" if "about" in row else ""
    where = f"{row['operation']} | {row['pass']} | {row['shape']['name']} | {row['competitor']}{about}"
    if "left_out" in row:
        return f"{where}: {row['left_out']}"
    times = row["milliseconds"]
    replay = row.get("replay_milliseconds")
    replayed = f", {milliseconds(replay)} replayed as a graph" if isinstance(replay, float) else ""
    if "replay_left_out" in row:
        replayed = f", no replay: {row['replay_left_out']}"
    return (
        f"{where}: {milliseconds(times['median'])} ({times['least']:.3g} to {times['most']:.3g} ms, {times['count']} "
        f"calls), {memory(row['extra_bytes'])}, {percent(row['share_of_limit'])} of the limit "
        f"({row['bound']}), error {row['error']:.1e}{replayed}"
    )
