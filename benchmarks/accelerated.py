"""Whether models are read as they are under attention backends, caches and parallelism, and run otherwise.

For each family a tiny random model goes through the checks of `corrdit.testing.check_backbone` that change how it runs.
In each of them the output with a capture of every layer has to be the output without it to the bit; in the last rows
two processes share the tokens, and what they read is compared with what one process reads. Checks that cannot be made
say why.

    python benchmarks/accelerated.py --output benchmarks/results/accelerated.json [--families wan ltx]
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import warnings

from experiment import Record, facts_apart, new_parser, write_json

from corrdit.integrations.diffusers.testing.accelerated_checks import ACCELERATED_CHECKS
from corrdit.testing import TINY_MODELS, check_backbone, tiny_backbone

PROCESS = pathlib.Path(__file__).parents[1] / "tests" / "diffusers" / "parallel_process.py"
PARALLEL = {
    "wan": ("wan", "wan-early", "wan-uneven", "wan-ring", "wan-cross", "wan-pipeline", "wan-compiled", "wan-tracked"),
    "ltx": ("ltx", "ltx-early", "ltx-ring", "ltx-cross"),
    "ltx2": ("ltx2", "ltx2-ring"),
}
"""Cases of two processes by family."""


def outcomes(family: str) -> dict[str, str]:
    """ "identical", why a check was not made, or what was wrong, by check."""
    found = {}
    for check in ACCELERATED_CHECKS:
        try:
            (result,) = check_backbone(tiny_backbone(family), only=(check,))
            found[check] = f"not made: {result.skipped}" if result.skipped else "identical"
        except AssertionError as error:
            found[check] = str(error)
    return found


def outcomes_of_two_processes(family: str) -> dict[str, str]:
    """The same by case, of the first process."""
    names = PARALLEL.get(family, ())
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(PROCESS)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), f"{folder}/meeting", *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for rank in range(2)
        ]
        outputs = [process.communicate()[0].decode() for process in processes]
    found = dict(line.split(": ", 1) for line in outputs[0].splitlines())
    return {f"two processes, {name}": found.get(name, "did not end") for name in names}


def main() -> None:
    parser = new_parser(__doc__)
    families = [name for name, model in TINY_MODELS.items() if "-" not in name and not model.variant]
    parser.add_argument("--families", nargs="+", default=families, help="names of tiny models; every family otherwise")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Record] = {}
    for family in arguments.families:
        rows[family] = {**outcomes(family), **outcomes_of_two_processes(family)}
        print(family, rows[family], flush=True)
    write_json(arguments.output, {**facts_apart(), "families": rows})


if __name__ == "__main__":
    main()
