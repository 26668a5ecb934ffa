"""Random calls of every operation, forward and backward, against float64: under triton's interpreter or on a GPU.

    python benchmarks/kernel_fuzz.py --first 0 --count 100 --output benchmarks/results/kernel_fuzz.json
    compute-sanitizer --tool memcheck python benchmarks/kernel_fuzz.py --device cuda --count 60 --output FILE

runs the cases of `corrdit.benchmark.random_cases.random_case` by their numbers and adds their rows to the file, in
place of rows of the same numbers and version of triton. An error is given as a share of what
`corrdit.benchmark.kernel_check` allows a GPU; of bfloat16, which the interpreter cuts off where a GPU rounds, it may be
up to 2. A file holds rows of one device. Exit status 1 if a case is wrong.
"""

from __future__ import annotations

import os
import sys

import torch
from experiment import Record, facts, new_parser, read_json, write_json

from corrdit.arguments import whole_number
from corrdit.benchmark.kernel_cases import BRAIN
from corrdit.benchmark.kernel_check import CUT_OFF, TOLERANCE, attempt
from corrdit.benchmark.random_cases import random_case
from corrdit.files import markdown_table


def summary(rows: list[Record]) -> list[Record]:
    """The worst error of each triton, operation and dtype, with the number of its case."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for row in rows:
        groups.setdefault((row["triton"], row["operation"], row["dtype"]), []).append(row)
    found = []
    for (triton, operation, dtype), cases in sorted(groups.items()):
        worst = max(cases, key=lambda row: row["error"])
        found.append({"triton": triton, "operation": operation, "dtype": dtype, "cases": len(cases),
                      "worst_error": worst["error"], "of_case": worst["number"]})  # fmt: skip
    return found


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=300, help="how many cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu: interpreted")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        # Before the first kernel is loaded.
        os.environ["TRITON_INTERPRET"] = "1"
    first, count = whole_number("first", arguments.first, 0), whole_number("count", arguments.count, 1)
    run = facts(device)
    held = read_json(arguments.output) if arguments.output.exists() else {"runs": [], "rows": []}
    if others := {one["device"] for one in held["runs"]} - {run["device"]}:
        parser.error(f"--output {arguments.output} holds rows of {', '.join(others)}; name another file")
    rows = {(row["triton"], row["number"]): row for row in held["rows"]}
    tolerance = {str(dtype).removeprefix("torch."): allowed for dtype, allowed in TOLERANCE.items()}
    wrong = 0
    for number in range(first, first + count):
        case = random_case(number)
        finding = attempt(case, device)
        error = finding.error * (CUT_OFF if case.dtype == BRAIN and device.type == "cpu" else 1.0)
        dtype = str(case.dtype).removeprefix("torch.")
        rows[run["triton"], number] = {
            "triton": run["triton"], "number": number, "operation": case.operation, "dtype": dtype,
            "error": round(error, 4) if error < float("inf") else 1e30,
            **({} if finding.wrong is None else {"wrong": finding.wrong}),
        }  # fmt: skip
        if finding.wrong is not None:
            wrong += 1
            print(f"wrong: {number}: {case.operation}, {dtype}: {finding.wrong}", flush=True)
        ordered = [rows[key] for key in sorted(rows)]
        write_json(
            arguments.output,
            {"runs": [*held["runs"], run], "tolerance": tolerance, "worst": summary(ordered), "rows": ordered},
        )
    print(
        markdown_table(list(summary(ordered)[0]), [[str(value) for value in row.values()] for row in summary(ordered)])
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
