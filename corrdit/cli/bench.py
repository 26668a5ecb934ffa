"""Time every operation against other ways to compute it, on this machine. Correctness is checked before any timing.

reads   nothing but the package; inputs are random
writes  a table to standard output; with --output results.json and pictures of time, memory and share of the limit

On a CUDA device the Triton kernels run over the shapes of published models, on a CPU the streaming backend over smaller
ones. Every row has the commit, the device and the versions it was measured with.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Any

from corrdit.cli.tables import print_table

HELP = "time the operations against other ways to compute them"
USAGE = "[--output DIR] [--operations NAMES] [--shapes NAMES] [options]"
DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--output", type=str, default=None, help="folder for results.json and the pictures")
    parser.add_argument("--operations", type=str, default="all", help="names, separated by ';', or all, or list")
    parser.add_argument("--shapes", type=str, default="default", help="names, separated by ',', or default, or list")
    parser.add_argument("--device", type=str, default=None, help="cuda or cpu; CUDA where there is one by default")
    parser.add_argument("--dtype", type=str, default=None, help="float32, float16 or bfloat16 (CUDA: bfloat16)")
    parser.add_argument("--backends", type=str, default="auto", help="our backends, separated by ','")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each")
    parser.add_argument("--no-rivals", action="store_true", help="leave the other ways out")
    parser.add_argument("--rival-gigabytes", type=float, default=None, help="memory that a rival's score maps may take")


def run(arguments: Any) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory and would chat about it
    from corrdit.benchmark.contests import CONTESTS
    from corrdit.benchmark.plots import write_plots
    from corrdit.benchmark.runner import run_contests, write_rows
    from corrdit.benchmark.shapes import SHAPES, default_shapes

    if "list" in (arguments.operations, arguments.shapes):
        print_table(("operation", "rivals"), [(name, "; ".join(c.rivals) or "none") for name, c in CONTESTS.items()])
        print_table(
            ("shape", "heads x head_dim, frames x rows x columns"), [(s.name, s.label) for s in SHAPES.values()]
        )
        return 0
    settings = _settings(arguments)
    defaults = ",".join(default_shapes(settings.device.type))
    shapes = _chosen("shape", defaults if arguments.shapes == "default" else arguments.shapes, SHAPES, ",")
    everything = ";".join(CONTESTS)
    operations = _chosen(
        "operation", everything if arguments.operations == "all" else arguments.operations, CONTESTS, ";"
    )
    output = None if arguments.output is None else pathlib.Path(arguments.output)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in run_contests(operations, [SHAPES[name] for name in shapes], settings):
        rows.append(row)
        print(_line(row), flush=True)
    _print_table(rows)
    if output is not None:
        write_rows(output / "results.json", " ".join(["corrdit", *sys.argv[1:]]), rows)
        for path in [output / "results.json", *write_plots(rows, output, "results")]:
            print(path)
    wrong = [row for row in rows if row.get("within_tolerance") is False and row["competitor"].startswith("corrdit")]
    if wrong:
        print(f"{len(wrong)} results of corrdit are outside the tolerance", file=sys.stderr)
    return 1 if wrong else 0


def _settings(arguments: Any) -> Any:
    import torch

    from corrdit.benchmark.runner import Settings
    from corrdit.ops.backends import BACKENDS

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cuda or cpu, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    backends = tuple(backend.strip() for backend in arguments.backends.split(","))
    for backend in backends:
        if backend not in BACKENDS:
            raise ValueError(f"--backends must be among {', '.join(BACKENDS)}, got {backend!r}")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
    if device.type == "cuda":
        memory = 0.4 * torch.cuda.get_device_properties(device).total_memory
    else:
        memory = 4 * 2**30
    given = arguments.rival_gigabytes
    return Settings(
        device=device,
        dtype=getattr(torch, dtype),
        backends=backends,
        rounds=arguments.rounds,
        rivals=not arguments.no_rivals,
        rival_bytes=memory if given is None else given * 2**30,
    )


def _chosen(kind: str, names: str, known: Any, separator: str) -> list[str]:
    chosen = [name.strip() for name in names.split(separator)]
    for name in chosen:
        if name not in known:
            raise ValueError(f"there is no {kind} {name!r} to time; there are {'; '.join(known)}")
    return chosen


def _line(row: Any) -> str:
    where = f"{row['operation']} | {row['pass']} | {row['shape']['name']} | {row['competitor']}"
    if "left_out" in row:
        return f"{where}: {row['left_out']}"
    times = row["milliseconds"]
    return f"{where}: {times['median']:.2f} ms ({times['least']:.2f} to {times['most']:.2f}), error {row['error']:.1e}"


def _print_table(rows: list[Any]) -> None:
    cells = []
    for row in rows:
        times = row.get("milliseconds")
        cells.append(
            (
                row["operation"],
                row["pass"],
                row["shape"]["name"],
                row["competitor"] + (f" ({row['about']})" if "about" in row else ""),
                row["left_out"] if times is None else f"{times['median']:.2f}",
                "" if times is None else f"{row['extra_bytes'] / 2**20:.1f}",
                "" if times is None else f"{100 * row['share_of_matmul_ceiling']:.0f} %",
            )
        )
    print_table(("operation", "pass", "shape", "by", "ms", "extra MiB", "of matmul limit"), cells)
