"""Everything a lent GPU is asked, from a plain checkout: no install, and nothing but torch, triton, numpy and einops.

    python benchmarks/gpu.py --output DIR [--minutes 45] [options of corrdit bench]

checks every kernel against float64 (`corrdit kernels --check`) and stops at the first wrong one; then `corrdit bench`
runs in pieces of five minutes, each of which goes on where the last one ended and loses no finished row. The same
command again goes on after a lease that ended, without the check if DIR says that it passed at this commit.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PIECE_MINUTES = 5.0
UNFINISHED = 3


def corrdit(*arguments: str) -> int:
    """The exit status of a command of this checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, "-m", "corrdit", *arguments], check=False, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the results of corrdit bench")
    parser.add_argument("--minutes", type=float, default=45.0, help="begin no further piece after so many")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    arguments, of_bench = parser.parse_known_args()
    start = time.monotonic()
    arguments.output.mkdir(parents=True, exist_ok=True)
    checked = arguments.output / "checked"
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    if not checked.exists() or not commit or checked.read_text(encoding="utf-8") != commit:
        status = corrdit("kernels", "--check", "--device", arguments.device)
        if status:
            return status
        checked.write_text(commit, encoding="utf-8")
    bench = ["bench", "--output", str(arguments.output), "--device", arguments.device, "--resume", *of_bench]
    status = UNFINISHED
    while status == UNFINISHED and (left := arguments.minutes - (time.monotonic() - start) / 60) > 0:
        status = corrdit(*bench, "--minutes", str(min(left, PIECE_MINUTES)))
    return status


if __name__ == "__main__":
    sys.exit(main())
