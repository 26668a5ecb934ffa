"""How long commands of the pages take with the shipped model, on two processor cores.

    python benchmarks/run_times.py --output benchmarks/results/run_times.json              # every command
    python benchmarks/run_times.py --output benchmarks/results/run_times.json --only demo track
    python benchmarks/result_tables.py                                                     # into the pages

Each command runs in a process of its own and is timed from start to end, loading included, in the environment this is
run in. The file keeps seconds by the clock, processor seconds of all its threads and processes, and the machine's load
when the command began: seconds by the clock mean nothing where others were at work. A row that is there is made anew
only where `--only` names it.
"""

from __future__ import annotations

import os
import pathlib
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from experiment import Record, facts, new_parser, read_json, write_json

from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.video import write_video

ROOT = pathlib.Path(__file__).parent.parent
THREADS = 2
SMALL, LARGE = (20, 160, 240), (24, 480, 720)
"""Frames, height and width of the video that a command finds as `my_video.mp4` and `reference.mp4`."""


@dataclass(frozen=True)
class Timed:
    """A command as a page shows it, and what it does in so long."""

    shown: str
    what: str
    run: tuple[str, ...] = ()
    """The module and its arguments that are run; empty: what is shown."""
    video: tuple[int, int, int] = SMALL
    videos: int = 0
    """Generated videos that lie in `world/`; the time is that of one of them."""


SUITE = ("pytest", "-n", str(THREADS), "--dist", "worksteal", "-m", "not slow", str(ROOT))
WORLD = ("corrdit", "world", "--output", "world", "--seed", "7", "--videos")
TIMED = {
    "demo": Timed("make demo", "256 points, 20 frames of 160 x 240", ("corrdit", "demo", "--output", "demo")),
    "test": Timed("make test", "the test suite in two processes", SUITE),
    "track": Timed("corrdit track my_video.mp4 --output tracks", "256 points, 20 frames of 160 x 240"),
    "track, larger": Timed(
        "corrdit track my_video.mp4 --output tracks --max-frames 24", "256 points, 24 frames of 480 x 720", video=LARGE
    ),
    "analyze": Timed(
        "corrdit analyze --world 20 --output analysis --calibrate", "every layer, step and head, 20 generated clips"
    ),
    "world": Timed("corrdit world --output world --videos 12 --seed 7", "12 videos with their truth"),
    "evaluate": Timed(
        "corrdit evaluate --data world --output scores --trackers ours,patches,still", "one of the videos", videos=2
    ),
    "generate": Timed(
        'corrdit generate "a red disc moves left over grass" --cag --output guided', "a video with and without guidance"
    ),
    "transfer": Timed(
        'corrdit transfer reference.mp4 "a blue star over sand" --num-frames 8 --size 32x48 --output transferred',
        "8 frames of 32 x 48",
    ),
    "transfer, larger": Timed(
        'corrdit transfer reference.mp4 "a blue star over sand" --num-frames 24 --size 480x720 --output transferred',
        "24 frames of 480 x 720",
        video=LARGE,
    ),
}


def main(words: list[str] | None = None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TIMED), help="make these rows anew, and keep the others")
    arguments = parser.parse_args(words)
    rows: Record = read_json(arguments.output)["rows"] if arguments.output.is_file() else {}
    for name in arguments.only or [name for name in TIMED if name not in rows]:
        rows[name] = timed(TIMED[name])
        print(f"{name}: {rows[name]['seconds']:.0f} s, processor {rows[name]['processor_seconds']:.0f} s", flush=True)
        write_json(arguments.output, {"rows": {name: rows[name] for name in TIMED if name in rows}})
    return 0


def timed(task: Timed) -> Record:
    """A row: what ran, for how long, on what, and how busy the machine was when it began.

    Raises:
        subprocess.CalledProcessError: the command failed; what it said stands on the error stream.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        frames, height, width = task.video
        clip = generate([9], WorldConfig(frames=frames, height=height, width=width, sprites=(2, 4)))[0]
        for name in ("my_video.mp4", "reference.mp4"):
            write_video(place / name, clip.video, 8)
        if task.videos:
            run((*WORLD, str(task.videos)), place)
        record, began, used = facts(), time.perf_counter(), processor_seconds()
        run(task.run or tuple(shlex.split(task.shown)), place)
        times = {"seconds": time.perf_counter() - began, "processor_seconds": processor_seconds() - used}
    shares = {name: round(value / max(task.videos, 1), 1) for name, value in times.items()}
    return {"shown": task.shown, "what": task.what, **shares, **record, "threads": THREADS}


def processor_seconds() -> float:
    """Of every child that has ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(words: Sequence[str], folder: pathlib.Path) -> None:
    """Run a module in a folder, on `THREADS` cores."""
    threads = THREADS if words[0] == "corrdit" else 1
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
        done.check_returncode()


if __name__ == "__main__":
    sys.exit(main())
