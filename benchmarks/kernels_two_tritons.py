"""Compiles the kernels ahead of time with several versions of triton, and keeps what their machine code shows.

    pip install --no-deps --target build/triton-3.6 triton==3.6.0
    python benchmarks/kernels_two_tritons.py --triton build/triton-3.6 --parts build/kernels --arch 90 --dtype bfloat16

compiles with the installed triton and with that of each folder, and writes
`benchmarks/results/kernels_two_tritons.json`: a row for each kernel as `corrdit kernels` prints it with its commit, and
for each published shape the share of its tiles, and of the places for blocks, that `folded_forward` fills. Rows of
launches that are not compiled anew stay. What `--parts` holds of the same sources is not compiled again, so that a run
can be stopped and taken up. Other options go to `corrdit kernels`.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

from experiment import RESULTS, Record, facts, new_parser, read_json, write_rows

from corrdit.benchmark.shapes import DEFAULT_SHAPES, SHAPES, Shape
from corrdit.kernels.displacement.folded import visited_scores
from corrdit.kernels.inspection.ahead_of_time import MULTIPROCESSORS, wave_use
from corrdit.kernels.shared.configs import tiles

OUTPUT = RESULTS / "kernels_two_tritons.json"
LAUNCH = ("triton", "op", "heads", "variant", "dtype", "head_dim", "arch")
ROOT = pathlib.Path(__file__).parent.parent
PUBLISHED = [name for name in DEFAULT_SHAPES["cuda"] if not name.endswith("frames")]


def compiled(folder: pathlib.Path | None, parts: pathlib.Path, options: Sequence[str]) -> list[Record]:
    """Rows of one triton, the installed one without a folder."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if folder is None:
        version = importlib.metadata.version("triton")
    else:
        path.insert(0, str(folder.resolve()))
        version = next(iter(importlib.metadata.distributions(name="triton", path=[str(folder)]))).version
    part = parts.resolve() / f"kernels-{version}.json"
    command = [sys.executable, "-m", "corrdit", "kernels", "--json", "--output", str(part), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, cwd=parts)
    held = read_json(part)
    return [{"commit": held["commit"], **row} for row in held["rows"]]


def replaced(held: Iterable[Record], made: Sequence[Record]) -> list[Record]:
    """The rows that are held, with those that were made in the places of the same launches, or at the end."""
    rows: dict[tuple[object, ...], list[Record]] = {}
    for row in held:
        rows.setdefault(tuple(row[name] for name in LAUNCH), []).append(row)
    fresh: dict[tuple[object, ...], list[Record]] = {}
    for row in made:
        fresh.setdefault(tuple(row[name] for name in LAUNCH), []).append(row)
    return [row for of_launch in (rows | fresh).values() for row in of_launch]


def shape_use(shape: Shape) -> Record:
    """Shares of `folded_forward` on 9.0, one block at a time, and their product where each pair has its own tiles."""
    chosen, tokens = tiles("folded_forward", "9.0", shape.head_dim, 2), shape.grid.tokens_per_frame
    rows, columns, *_ = chosen
    queries, places = shape.frames * tokens, MULTIPROCESSORS[90]
    together = queries * tokens / visited_scores(queries, tokens, chosen)
    waves = wave_use(shape.frames * -(-queries // rows), places)
    blocks = -(-tokens // rows)
    apart = tokens**2 / (blocks * rows * -(-tokens // columns) * columns) * wave_use(shape.frames**2 * blocks, places)
    shares = {"tile_use": together, "wave_use": waves, "product": together * waves, "product_pair_by_pair": apart}
    return {"shape": shape.name, "tiles": list(chosen), **{name: round(share, 4) for name, share in shares.items()}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(__doc__, output=False)
    parser.add_argument("--triton", type=pathlib.Path, nargs="+", default=[], help="folders with other versions")
    parser.add_argument("--parts", type=pathlib.Path, required=True, help="folder for the rows of each version")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file to write")
    given, options = parser.parse_known_args(arguments)
    given.parts.mkdir(parents=True, exist_ok=True)
    rows = read_json(given.output)["rows"] if given.output.is_file() else []
    for folder in (None, *given.triton):
        rows = replaced(rows, compiled(folder, given.parts, options))
    shapes = [shape_use(SHAPES[name]) for name in PUBLISHED]
    write_rows(given.output, {**facts(), "shapes": shapes, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
