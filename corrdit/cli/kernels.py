"""Compile every Triton kernel ahead of time, without a GPU, and read its cost from the machine code.

reads   nothing
writes  to standard output a table, or with --json one JSON object a line: op, pass ("forward" or "backward"), heads,
        dtype, head_dim, arch, kernel, tiles (rows, columns, dims, warps, stages), registers, spill_bytes,
        shared_bytes, launchable, tensor_cores (in every matrix product), serialized_products,
        instructions_per_element (of the main loop)
"""

from __future__ import annotations

import json
import os
from typing import Any

HELP = "compile every Triton kernel without a GPU and show registers, spills and instructions"
USAGE = "[--arch 80 90 100] [--json] [--op OP ...] [--dtype DTYPE ...] [--head-dim D ...]"
_COLUMNS = (
    ("op", 22), ("pass", 9), ("heads", 14), ("kernel", 22), ("dtype", 9), ("head_dim", 9), ("arch", 5),
    ("registers", 10), ("spill_bytes", 12), ("shared_bytes", 13), ("launchable", 11), ("tensor_cores", 13),
    ("instructions_per_element", 24),
)  # fmt: skip


def add_arguments(parser: Any) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities: 80, 89, 90, 100")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--op", nargs="+", default=None, help="only these operations")
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"], help="only these dtypes")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[16, 64, 96, 128, 256], help="only these head_dims")


def run(arguments: Any) -> int:
    # Compiling is what is asked for: interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from corrdit.kernels.catalogue import compile_all

    if not arguments.json:
        print("".join(name.ljust(width) for name, width in _COLUMNS).rstrip())
    for row in compile_all(arguments.arch, arguments.dtype, arguments.head_dim, arguments.op):
        report = row.report()
        if arguments.json:
            print(json.dumps(report), flush=True)
        else:
            print("".join(str(report[name]).ljust(width) for name, width in _COLUMNS).rstrip(), flush=True)
    return 0
