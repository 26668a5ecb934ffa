"""Compile every Triton kernel ahead of time, without a GPU, and read its cost from the machine code.

reads   nothing; with --output results.json, what that file already holds of the same kernel sources
writes  a table to standard output, or with --json one JSON object a line, a row for each kernel and dtype: registers,
        spilled bytes, shared memory, tensor cores, blocks at once, instructions of the main loop for each element;
        with --output the same in a file, so that a run can be stopped and taken up again
With --check nothing is compiled ahead: every operation runs in every mode and with every option, forward and backward,
and is compared with float64, on a CUDA device, or under triton's interpreter without one. It needs torch, triton, numpy
and einops alone. Exit status 1 if any result is wrong.

Columns: op, pass ("forward" or "backward"), heads, variant ("plain", or a call with a "mask", a "window", "weights" of
the heads, or a "large frame"), dtype, head_dim, arch, kernel, tiles (rows, columns, dims, warps, stages), registers,
spill_bytes, shared_bytes, launchable, tensor_cores (in every matrix product; true where there is none),
serialized_products, repetition (threads that compute each score), resident_blocks (of a multiprocessor), overlap (share
of the exponentials taken while a product is under way), tile_use and wave_use (shares of tiles, and of places for
blocks, that have work), triton (its version), instructions_per_element (of the main loop), cycles_per_element (of each
unit), and for soft displacement of single heads floor_cycles_per_element. The file has also the command, the commit and
the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

HELP = "compile every Triton kernel without a GPU and show registers, spills and instructions"
EXAMPLES = (
    "corrdit kernels --arch h100",
    "corrdit kernels --arch 80 90 --op match --dtype bfloat16 --json",
    "corrdit kernels --check --device cuda",
)
USAGE = (
    "[--arch 80 90 ...] [--json] [--output FILE] [--op OP ...] [--variant V ...] [--dtype T ...] [--head-dim D ...]\n"
    "       corrdit kernels --check [--device cuda]"
)
_COLUMNS = (
    ("op", 22), ("pass", 9), ("heads", 14), ("variant", 12), ("kernel", 22), ("dtype", 9), ("head_dim", 9),
    ("arch", 5),
    ("registers", 10), ("spill_bytes", 12), ("shared_bytes", 13), ("launchable", 11), ("tensor_cores", 13),
    ("serialized_products", 20), ("resident_blocks", 16), ("overlap", 8), ("tile_use", 9), ("wave_use", 9),
    ("instructions_per_element", 24),
)  # fmt: skip
_CARDS = {
    **dict.fromkeys(("a100", "a30"), "80"),
    **dict.fromkeys(("a10", "a40", "a6000", "rtx3090"), "86"),
    **dict.fromkeys(("l4", "l40", "l40s", "rtx4090"), "89"),
    **dict.fromkeys(("h100", "h200", "gh200"), "90"),
    **dict.fromkeys(("b100", "b200", "gb200"), "100"),
    **dict.fromkeys(("rtx5090", "rtxpro6000"), "120"),
}
"""NVIDIA's compute capabilities, https://developer.nvidia.com/cuda-gpus."""
_OF_COMPILING = {
    "arch": ["90"],
    "json": False,
    "output": None,
    "op": None,
    "variant": None,
    "dtype": ["float16", "bfloat16", "float32"],
    "head_dim": [16, 64, 96, 128, 256],
    "precision": "ieee",
}
"""Options that --check does not take, with their defaults."""
_KEY = ("op", "heads", "variant", "dtype", "head_dim", "arch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="compare every kernel with float64 where it runs")
    parser.add_argument("--device", type=str, default=None, help="of --check: cuda, cuda:1, or cpu (interpreted)")
    parser.add_argument(
        "--arch",
        nargs="+",
        default=_OF_COMPILING["arch"],
        help="compute capabilities (80, 86, 89, 90, 100, 120) or cards (a100, h100, ...)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--output", type=str, default=None, help="a JSON file that collects the rows")
    parser.add_argument("--op", nargs="+", default=None, help="only these operations")
    parser.add_argument("--variant", nargs="+", default=None, help="only these: plain, mask, window, weights, ...")
    parser.add_argument("--dtype", nargs="+", default=_OF_COMPILING["dtype"], help="only these dtypes")
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=_OF_COMPILING["head_dim"], help="only these head_dims"
    )
    parser.add_argument("--precision", type=str, default="ieee", help="of products of float32: ieee or tf32")


def run(arguments: argparse.Namespace) -> int:
    if arguments.check:
        given = [name for name, default in _OF_COMPILING.items() if getattr(arguments, name) != default]
        if given:
            said = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--check runs every kernel in every mode, and takes --device alone; leave out {said}")
        return _check_results(arguments.device)
    if arguments.device is not None:
        raise ValueError("--device says where --check runs; compiling ahead of time takes --arch")
    # Compiling is what is asked for: interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from corrdit.arguments import dtype_name
    from corrdit.kernels.inspection.ahead_of_time import ARCHITECTURES
    from corrdit.kernels.inspection.catalogue import compile_entry, requests, sources
    from corrdit.kernels.requirements import DTYPES, HEAD_DIMS, unwritable_cache
    from corrdit.problem import FLOAT32_PRECISIONS

    # Everything is looked at before the first kernel is compiled.
    arches = [_compute_capability(name, [str(arch) for arch in ARCHITECTURES]) for name in arguments.arch]
    accepted = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    dtypes = [dtype_name("--dtype", name, accepted) for name in arguments.dtype]
    _check("--head-dim", arguments.head_dim, range(HEAD_DIMS[0], HEAD_DIMS[1] + 1))
    _check("--precision", [arguments.precision], FLOAT32_PRECISIONS)
    if reason := unwritable_cache():
        raise ValueError(reason)
    wanted = list(requests(arches, dtypes, arguments.head_dim, arguments.op, arguments.variant))
    output = None if arguments.output is None else pathlib.Path(arguments.output)
    digest = f"{sources()} {arguments.precision}"
    rows = [] if output is None else _rows_of(output, digest)
    if output is not None:
        _write(output, digest, rows)
    if not arguments.json:
        print("".join(name.ljust(width) for name, width in _COLUMNS).rstrip())
    for request in wanted:
        key = (*request.entry, request.dtype, request.head_dim, request.arch)
        found = [row for row in rows if tuple(row[name] for name in _KEY) == key]
        if not found:
            found = [row.report() for row in compile_entry(*request, precision=arguments.precision)]
            rows += found
            if output is not None:
                _write(output, digest, rows)
        for row in found:
            line = json.dumps(row) if arguments.json else _line(row)
            print(line, flush=True)
    return 0


def _compute_capability(name: str, accepted: Sequence[str]) -> int:
    """90 for "90", "9.0", "sm_90" or "h100"."""
    from corrdit.arguments import nearest

    word = name.lower()
    number = _CARDS.get(word, word.removeprefix("sm_").replace(".", ""))
    if number not in accepted:
        raise ValueError(
            f"--arch must be one of {', '.join(accepted)} (compute capabilities) or {', '.join(_CARDS)}, got {name}"
            f"{nearest(word, [*accepted, *_CARDS])}"
        )
    return int(number)


def _check_results(name: str | None) -> int:
    import torch

    from corrdit.cli.devices import checked_device
    from corrdit.kernels.requirements import unfit_machine

    device = checked_device(name) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
        # "cuda" has no index, without which no device can be made the current one.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        if reason := unfit_machine("cpu", interpreted=True):
            raise ValueError(reason)
    from corrdit.benchmark.environment import device_name
    from corrdit.benchmark.kernel_check import findings

    print(f"every kernel against float64 on {device_name(device)}, largest error as a share of what is allowed")
    count = wrong = 0
    for finding in findings(device):
        count += 1
        print(f"{finding.error:8.3f}  {finding.name}", flush=True)
        if finding.wrong is not None:
            wrong += 1
            print(f"corrdit kernels: wrong: {finding.name}: {finding.wrong}", file=sys.stderr)
    print(f"{wrong} of {count} cases are wrong" if wrong else f"{count} cases are right")
    return 1 if wrong else 0


def _line(row: dict[str, object]) -> str:
    return "".join(str(row[name]).ljust(width) for name, width in _COLUMNS).rstrip()


def _rows_of(output: pathlib.Path, digest: str) -> list[dict[str, object]]:
    """The rows a file holds if they are of these sources; none where there is no file or it is of others."""
    from corrdit.files import parsed_json

    if not output.exists():
        return []
    try:
        held = parsed_json(output.read_text(encoding="utf-8"))
        return list(held["rows"]) if held["sources"] == digest else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output {output} holds something else than rows of this command; name another") from error


def _check(option: str, given: Sequence[object], accepted: Sequence[object]) -> None:
    for value in given:
        if value not in accepted:
            names = f"{accepted[0]} to {accepted[-1]}" if isinstance(accepted, range) else ", ".join(map(str, accepted))
            raise ValueError(f"{option} must be one of {names}, got {value}")


def _write(output: pathlib.Path, digest: str, rows: list[dict[str, object]]) -> None:
    import torch

    from corrdit.benchmark.environment import environment
    from corrdit.files import written_beside

    facts = {"command": " ".join(["corrdit", *sys.argv[1:]]), **environment(torch.device("cpu")), "sources": digest}
    with written_beside(output, "w") as file:
        lines = ",\n".join(json.dumps(row) for row in rows)
        file.write(json.dumps(facts, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
