"""Kernels compiled without a GPU: no spills, launchable, tensor cores, instructions for each score."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corrdit.kernels import ahead_of_time, catalogue, configs

# Instructions a score needs at least: multiply-add of the exponent, maximum, exponential, half a conversion.
FORWARD_BAR = 6.0
# dq at head_dim 64: products of depth 64 + 16 + 64 on tensor cores bind at 0.0703 cycles a score, 9.0 issue slots.
BACKWARD_FLOOR_CYCLES = (64 + 16 + 64) / ahead_of_time.TENSOR_PRODUCTS["9.0"]


def compiled(*options: str) -> list[dict[str, Any]]:
    """Rows of `corrdit kernels --json` from a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = shutil.which("corrdit", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "kernels", "--json", *options], capture_output=True, text=True, env=environment,
                          cwd="/", check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(row: dict[str, Any]) -> None:
    assert row["launchable"], row
    assert not row["serialized_products"], row
    # Refinement gathers single keys and multiplies none.
    assert row["tensor_cores"] or row["kernel"] == "refinement" or row["dtype"] == "float32", row
    if row["dtype"] != "float32":
        assert row["spill_bytes"] == 0, row


def test_soft_displacement_of_one_head_on_hopper():
    rows = compiled("--arch", "90", "--op", "soft_displacement", "--dtype", "bfloat16", "--head-dim", "64")
    by_kernel = {row["kernel"]: row for row in rows}
    for row in rows:
        assert_sound(row)
    assert by_kernel["soft_forward"]["instructions_per_element"] <= FORWARD_BAR
    for kernel in ("soft_backward_query", "soft_backward_key"):
        cycles = by_kernel[kernel]["instructions_per_element"] / ahead_of_time.ISSUE_LANES
        assert max(cycles, 1 / ahead_of_time.EXPONENTIALS) <= 1.3 * BACKWARD_FLOOR_CYCLES
    assert by_kernel["folded_forward"]["epilogue_share_of_tensor_cycles"] <= 0.10
    assert set(rows[0]) >= {
        "op", "pass", "heads", "dtype", "head_dim", "arch", "registers", "spill_bytes", "shared_bytes", "launchable",
        "tensor_cores", "instructions_per_element",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", catalogue.HEAD_DIMS)
def test_every_kernel_on_hopper(head_dim):
    for row in compiled("--arch", "90", "--dtype", "bfloat16", "float16", "--head-dim", str(head_dim)):
        assert_sound(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 89, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_elsewhere_launches(arch, dtype):
    for row in compiled("--arch", str(arch), "--dtype", dtype, "--head-dim", "64", "256"):
        assert row["launchable"], row
        assert row["tensor_cores"] or row["kernel"] == "refinement" or dtype == "float32", row


def test_an_interpreting_process_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"), ahead_of_time.absent_device(90):
        pass
    with (
        pytest.raises(ValueError, match="arch must be one of 80, 89, 90, 100, got 75"),
        ahead_of_time.absent_device(75),
    ):
        pass


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no operation is called 'nothing'"):
        list(catalogue.compile_all([90], ["float16"], [64], ["nothing"]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        list(catalogue.compile_all([90], ["float64"], [64], ["match"]))


def test_tables_cover_every_kernel_on_every_architecture():
    for architecture in configs.ARCHITECTURES:
        for kernel in configs._LARGE:
            for head_dim in (8, 10, 64, 96, 128, 256):
                for element in (2, 4):
                    chosen = configs.tiles(kernel, architecture, head_dim, element)
                    assert chosen.dims <= configs.padded_head_dim(head_dim)
