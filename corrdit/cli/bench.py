"""Time every operation against other ways to compute it, on this machine. Correctness is checked before any timing.

reads   nothing but the package (inputs are random); with --resume or --redraw the results.json of the folder
writes  the times to standard output; into --output results.json, table.md, and pictures of time and memory against
        tokens and of the share of the device's limit
Status 3 says that the time of --minutes was up, status 1 that one of our own results is wrong or failed.

On a CUDA device the Triton kernels run over the shapes of published models, on a CPU the streaming backend over smaller
ones. Every row has the commit, the device and the versions it was measured with. A way that is wrong, has no memory or
fails has a row that says so. results.json is complete after every measurement; for machines that are lent by the
minute, repeat `corrdit bench --output DIR --resume --minutes 8` until it ends with status 0.
"""

from __future__ import annotations

import argparse
import os

HELP = "time the operations against other ways to compute them"
EXAMPLES = (
    "corrdit bench --output bench",
    "corrdit bench --output bench --operations match --resume --minutes 8",
    "corrdit bench --operations list",
)
USAGE = "[--output DIR [--resume] [--minutes N]] [--operations NAMES] [--baselines NAMES] [--shapes NAMES] [options]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=str, default=None, help="folder for results.json, table.md and the pictures")
    parser.add_argument("--resume", action="store_true", help="measure only what the folder's results.json lacks")
    parser.add_argument("--minutes", type=float, default=None, help="begin no further measurement after so many")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: table and pictures from results.json")
    parser.add_argument("--plan", action="store_true", help="measure nothing: show what would be, and its floors")
    parser.add_argument("--operations", type=str, default="all", help="names (match is both matches), all, or list")
    parser.add_argument(
        "--baselines",
        type=str,
        default="default",
        help="the other ways: names, all, none, list, or default: those that compile at the first shape alone",
    )
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
    for old, new, kind in (("--rivals", "baselines", str), ("--rival-gigabytes", "baseline_gigabytes", float)):
        parser.add_argument(old, dest=new, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts memory and would chat about it
    from corrdit.cli.bench_run import run_benchmark

    return run_benchmark(arguments)
