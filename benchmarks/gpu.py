"""Everything a lent GPU is asked, from a plain checkout: no install, and nothing but torch, triton, numpy and einops.

    python benchmarks/gpu.py --output DIR [--minutes 45] [options of corrdit bench]

says what is planned, compares every kernel with float64 (`corrdit kernels --check`, into DIR/check.txt) and then runs
`corrdit bench` in pieces of five minutes, each of which goes on where the last one ended and loses no finished row. A
wrong kernel does not keep the others from being timed. The same command again goes on after a lease that ended, without
the check if DIR says that it passed at this commit. `--device cpu` tries the same without a GPU, with interpreted
kernels.

Exit status: 0 when all is right and measured, 1 when a result is wrong or failed, 2 when it cannot start, 3 when
measurements are left.
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
NEEDED = ("torch", "triton", "numpy", "einops")
SUCCESS, FAILED, CANNOT_START, UNFINISHED = 0, 1, 2, 3


def corrdit(*arguments: str, log: pathlib.Path | None = None) -> int:
    """The exit status of a command of this checkout; what it prints is shown, and kept in `log`."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    command, environment = [sys.executable, "-u", "-m", "corrdit", *arguments], {**os.environ, "PYTHONPATH": path}
    if log is None:
        return subprocess.run(command, check=False, env=environment).returncode
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
    return process.returncode


def cannot_start(device: str) -> str | None:
    """What this machine lacks."""
    from importlib.util import find_spec

    if absent := [name for name in NEEDED if find_spec(name) is None]:
        return f"{', '.join(absent)} cannot be imported by {sys.executable}; {', '.join(NEEDED)} are needed"
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device here; --device cpu tries the same without one"
    return None


def commit() -> str | None:
    """The commit of this checkout, None where there is no git or the files differ from it."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    name = done.stdout.strip()
    return name if done.returncode == 0 and not name.endswith("-dirty") else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the results of corrdit bench")
    parser.add_argument("--minutes", type=float, default=45.0, help="begin no further piece after so many")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    arguments, of_bench = parser.parse_known_args()
    start = time.monotonic()
    if reason := cannot_start(arguments.device):
        print(f"gpu.py: {reason}", file=sys.stderr)
        return CANNOT_START
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu.py: --output {arguments.output} cannot be made a folder: {error.strerror}", file=sys.stderr)
        return CANNOT_START
    bench = ["bench", "--output", str(arguments.output), "--device", arguments.device, *of_bench]
    if status := corrdit(*bench, "--plan", "--minutes", str(arguments.minutes)):
        return status
    passed, here = arguments.output / "checked", commit()
    checked = SUCCESS
    if here is None or not passed.exists() or passed.read_text(encoding="utf-8") != here:
        checked = corrdit("kernels", "--check", "--device", arguments.device, log=arguments.output / "check.txt")
        if checked == SUCCESS and here is not None:
            passed.write_text(here, encoding="utf-8")
    status = UNFINISHED
    while status == UNFINISHED and (left := arguments.minutes - (time.monotonic() - start) / 60) > 0:
        status = corrdit(*bench, "--resume", "--minutes", str(min(left, PIECE_MINUTES)))
    return status or checked


if __name__ == "__main__":
    sys.exit(main())
