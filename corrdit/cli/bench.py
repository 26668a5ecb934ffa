"""Time every operation against other ways to compute it, on this machine. Correctness is checked before any timing.

reads   nothing but the package (inputs are random); with --resume or --redraw the results.json of the folder
writes  the times to standard output; into --output results.json, table.md, and pictures of time and memory against
        tokens and of the share of the device's limit

On a CUDA device the Triton kernels run over the shapes of published models, on a CPU the streaming backend over smaller
ones. Every row has the commit, the device and the versions it was measured with. A way that is wrong, has no memory or
fails has a row that says so. results.json is complete after every measurement; for machines that are lent by the
minute, repeat

    corrdit bench --output DIR --resume --minutes 8

until it ends with status 0: status 3 says that time was up, status 1 that one of our own results is wrong or failed.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corrdit.cli.tables import print_table

if TYPE_CHECKING:
    from corrdit.benchmark.floors import Ceilings
    from corrdit.benchmark.runner import Piece, Row, Settings

HELP = "time the operations against other ways to compute them"
USAGE = "[--output DIR [--resume] [--minutes N]] [--operations NAMES] [--baselines NAMES] [--shapes NAMES] [options]"
DTYPES = ("float32", "float16", "bfloat16")
SUCCESS, FAILED, UNFINISHED = 0, 1, 3
CHECKED_FRAMES_ON_CPU = 2
# Of the memory that is free: what inputs, gradients and a baseline's maps may take.
USABLE = 0.8


def add_arguments(parser: Any) -> None:
    parser.add_argument("--output", type=str, default=None, help="folder for results.json, table.md and the pictures")
    parser.add_argument("--resume", action="store_true", help="measure only what the folder's results.json lacks")
    parser.add_argument("--minutes", type=float, default=None, help="begin no further measurement after so many")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: table and pictures from results.json")
    parser.add_argument("--plan", action="store_true", help="measure nothing: show what would be, and its floors")
    parser.add_argument("--operations", type=str, default="all", help="names (match is both matches), all, or list")
    parser.add_argument("--baselines", type=str, default="all", help="the other ways: names, all, none, or list")
    parser.add_argument("--shapes", type=str, default="default", help="names, default, or list")
    parser.add_argument("--device", type=str, default=None, help="cuda, cuda:1 or cpu; CUDA where there is one")
    parser.add_argument("--dtype", type=str, default=None, help="float32, float16 or bfloat16 (the one of CUDA)")
    parser.add_argument("--backends", type=str, default="auto", help="our backends, separated by commas")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each, at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="timed calls of each end after so many, at least 3")
    parser.add_argument(
        "--check-frames", type=int, default=None, help="frames compared with float64 (CPU: 2; CUDA: all)"
    )
    parser.add_argument(
        "--baseline-gigabytes", type=float, default=None, help="memory that a baseline's score maps may take"
    )
    parser.add_argument("--commit", type=str, default=None, help="for the rows, where the folder is no git checkout")
    # Names of 0.1, until 0.3.
    hidden = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--rival-gigabytes", dest="baseline_gigabytes", type=float, **hidden)
    parser.add_argument("--rivals", dest="baselines", type=str, **hidden)


def run(arguments: Any) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory and would chat about it
    if "list" in (arguments.operations, arguments.baselines, arguments.shapes):
        return _print_names()
    output = _checked_output(arguments)
    if arguments.redraw:
        return _redraw(output)
    settings = _settings(arguments)
    todo, absent = _chosen_pieces(arguments, settings)
    if arguments.plan:
        _print_plan(todo, settings, None if absent else _measured_ceilings(settings), absent=absent)
        return SUCCESS
    return _measure(todo, settings, output, arguments)


def _measure(todo: Sequence[Piece], settings: Settings, output: pathlib.Path | None, arguments: Any) -> int:
    from corrdit.benchmark import row_file
    from corrdit.benchmark.runner import run_piece, surroundings

    start = time.monotonic()
    where = surroundings(settings)
    rows = row_file.read_rows(output / row_file.FILE) if output is not None and arguments.resume else []
    left = {piece: names for piece in todo if (names := row_file.missing(piece, settings, rows, where))}
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} measurements are in {output} already", flush=True)
    if left:
        ceilings = _measured_ceilings(settings)
        _print_plan(list(left), settings, ceilings)
    unfinished = len(left)
    for piece, names in left.items():
        if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
            break
        for row in _written(run_piece(piece, settings, ceilings, where, names), rows, output):
            print(_line(row), flush=True)
        unfinished -= 1
    if output is not None and rows:
        _write_report(rows, output)
    return _status(rows, todo, unfinished)


def _written(new: Iterator[Row], rows: list[Row], output: pathlib.Path | None) -> Iterator[Row]:
    """Rows of a piece as they come; they are on the disk when the piece is over, or has left by an exception."""
    from corrdit.benchmark import row_file

    fresh = []
    try:
        for row in new:
            fresh.append(row)
            yield row
    finally:
        rows[:] = row_file.merged(rows, fresh)
        if output is not None and fresh:
            row_file.write_rows(output / row_file.FILE, " ".join(["corrdit", *sys.argv[1:]]), rows)


def _status(rows: Sequence[Row], todo: Sequence[Piece], unfinished: int) -> int:
    from corrdit.benchmark.row_file import failed_rows

    asked = {(piece.operation, piece.shape.name) for piece in todo}
    failed = [row for row in failed_rows(rows) if (row["operation"], row["shape"]["name"]) in asked]
    for row in failed:
        print(f"corrdit bench: {_line(row)}", file=sys.stderr)
    if unfinished:
        print(f"time is up, {unfinished} measurements are left: the same command with --resume goes on", flush=True)
        return UNFINISHED
    return FAILED if failed else SUCCESS


def _write_report(rows: Sequence[Row], output: pathlib.Path) -> None:
    from corrdit.benchmark import row_file
    from corrdit.benchmark.plots import write_plots
    from corrdit.benchmark.report import write_table

    for path in [output / row_file.FILE, write_table(rows, output), *write_plots(rows, output)]:
        print(path, flush=True)


def _redraw(output: pathlib.Path | None) -> int:
    from corrdit.benchmark import row_file

    rows = [] if output is None else row_file.read_rows(output / row_file.FILE)
    if output is None or not rows:
        raise ValueError(f"--redraw needs --output DIR with the {row_file.FILE} of an earlier run, got {output}")
    _write_report(rows, output)
    return SUCCESS


def _measured_ceilings(settings: Settings) -> Ceilings:
    from corrdit.benchmark.measure import measure_ceilings

    return measure_ceilings(settings.device, settings.dtype)


def _checked_output(arguments: Any) -> pathlib.Path | None:
    """The folder, made if need be; its results are not overwritten unless they are to be resumed."""
    from corrdit.benchmark.row_file import FILE

    if arguments.output is None:
        if arguments.resume:
            raise ValueError("--resume goes on with the results of a folder; name it with --output DIR")
        return None
    output = pathlib.Path(arguments.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder, which is made if need be")
    if (output / FILE).exists() and not (arguments.resume or arguments.redraw or arguments.plan):
        raise ValueError(f"{output / FILE} is there already; add --resume to go on with it, or name another folder")
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise ValueError(f"--output {output} cannot be written; give a folder that can")
    return output


def _settings(arguments: Any) -> Settings:
    import torch

    from corrdit.benchmark.comparisons import BASELINES
    from corrdit.benchmark.runner import Settings
    from corrdit.ops.backends import BACKENDS

    device = _device(arguments.device, planned=arguments.plan)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
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


def _device(name: str | None, *, planned: bool) -> Any:
    """A device that is here; a plan may be of one that is not."""
    import torch

    from corrdit.cli.devices import usable_devices

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


def _free_bytes(device: Any) -> float:
    """Memory that can be had on a device; infinite where nothing is known of it."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) if torch.cuda.is_available() else math.inf
    information = pathlib.Path("/proc/meminfo")
    lines = information.read_text(encoding="ascii").splitlines() if information.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * found[0] if found else math.inf


def _chosen_pieces(arguments: Any, settings: Settings) -> tuple[list[Piece], bool]:
    """What is to be measured, and whether that is the plan for a device that is not here."""
    import torch

    from corrdit.benchmark.comparisons import COMPARISONS
    from corrdit.benchmark.runner import pieces
    from corrdit.benchmark.shapes import SHAPES, default_shapes

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
    return pieces(operations, fitting), absent


def _input_bytes(shape: Any, settings: Settings) -> float:
    """Of q, k, v, their gradients and the intermediate float32 of one, and of the same in float64 for the check."""
    checked = min(settings.checked_frames or shape.frames, shape.frames)
    share = (shape.text_tokens + checked * shape.height * shape.width) / shape.grid.tokens
    return float(shape.channels * shape.grid.tokens * (6 * settings.dtype.itemsize + 4 + 48 * share))


def _names(kind: str, names: str, known: Mapping[str, Any]) -> list[str]:
    """Names separated by commas; all and, of baselines, none; an operation's name stands for all of its kinds."""
    if names == "all":
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
    from corrdit.benchmark.comparisons import BASELINES, COMPARISONS
    from corrdit.benchmark.shapes import SHAPES

    comparisons = COMPARISONS.items()
    passes = [("forward and backward" if comparison.backward else "forward") for comparison in COMPARISONS.values()]
    print_table(
        ("operation", "passes", "baselines"),
        [(name, label, ", ".join(c.baselines)) for (name, c), label in zip(comparisons, passes, strict=True)],
    )
    print_table(("baseline", "what it is"), list(BASELINES.items()))
    print_table(("shape", "heads x head_dim, frames x rows x columns"), [(s.name, s.label) for s in SHAPES.values()])
    return SUCCESS


def _print_plan(todo: Sequence[Piece], settings: Settings, ceilings: Ceilings | None, *, absent: bool = False) -> None:
    """One line that says what is measured against which limits, and a table of the floors."""
    from corrdit.benchmark.environment import device_name
    from corrdit.benchmark.floors import H200
    from corrdit.benchmark.report import milliseconds

    if ceilings is None:
        ceilings = H200
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


def _line(row: Row) -> str:
    from corrdit.benchmark.report import memory, milliseconds, percent

    about = f" ({row['about']})" if "about" in row else ""
    where = f"{row['operation']} | {row['pass']} | {row['shape']['name']} | {row['competitor']}{about}"
    if "left_out" in row:
        return f"{where}: {row['left_out']}"
    times = row["milliseconds"]
    return (
        f"{where}: {milliseconds(times['median'])} ({times['least']:.3g} to {times['most']:.3g} ms, {times['count']} "
        f"calls), {memory(row['extra_bytes'])}, {percent(row['share_of_limit'])} of the limit "
        f"({row['bound']}), error {row['error']:.1e}"
    )
