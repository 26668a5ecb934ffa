"""Kernels compiled without a GPU: no spills, launchable, tensor cores, instructions for each score."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corrdit.cli import main
from corrdit.kernels.inspection import ahead_of_time, catalogue, disassembly, floors
from corrdit.kernels.shared import configs

# Of the forward pass, whose loop holds two tiles at once: instructions a score, and exponentials beside a product.
FORWARD_BAR, OVERLAP = 7.0, 0.6
# The gradients' loops over the instructions no kernel can do without; `inspection/floors.py` says what is between.
# That of the keys has 64 queries a tile, which triton 3.6 does not spill, and so more instructions for each score.
BACKWARD_INSTRUCTIONS = {"soft_backward_query": 1.4, "soft_backward_key": 1.75}


# A folder with another version of triton, as `pip install --no-deps --target FOLDER triton==VERSION` makes it.
ANOTHER_TRITON = os.environ.get("CORRDIT_ANOTHER_TRITON")


def compiled(*options: str, triton: str | None = None) -> list[dict[str, Any]]:
    """Rows of `corrdit kernels --json` from a process that does not interpret, with the triton of a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([triton, environment.get("PYTHONPATH", "")])
    script = shutil.which("corrdit", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "kernels", "--json", *options], capture_output=True, text=True, env=environment,
                          cwd="/", check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(row: dict[str, Any]) -> None:
    assert row["launchable"], row
    assert not row["serialized_products"], row
    # Gradients of frame-local attention at head_dim 256 need two warps for a row's accumulators.
    assert row["repetition"] == 1 or row["dtype"] == "float32" or row["kernel"].startswith("local_backward"), row
    assert row["tensor_cores"] or row["dtype"] == "float32", row
    if row["dtype"] != "float32":
        assert row["spill_bytes"] == 0, row


# Forward and gradients of single heads and of averaged logits, their windows, and matching: `make test-triton`.
@pytest.mark.slow
@pytest.mark.skipif(ANOTHER_TRITON is None, reason="CORRDIT_ANOTHER_TRITON names no folder with another triton")
@pytest.mark.parametrize(
    ("operation", "variant"), [("soft_displacement", "plain"), ("soft_displacement", "window"), ("match", "plain")]
)
def test_the_main_kernels_on_another_triton(operation, variant):
    options = ("--arch", "90", "--op", operation, "--variant", variant, "--dtype", "bfloat16")
    rows = compiled(*options, "--head-dim", "64", triton=ANOTHER_TRITON)
    assert len(rows) >= 4
    assert {row["triton"] for row in rows} != {importlib.metadata.version("triton")}
    for row in rows:
        assert_sound(row)


def test_soft_displacement_of_one_head_on_hopper():
    rows = compiled(
        "--arch", "90", "--op", "soft_displacement", "--variant", "plain", "--dtype", "bfloat16", "--head-dim", "64"
    )
    by_kernel = {row["kernel"]: row for row in rows}
    for row in rows:
        assert_sound(row)
    assert by_kernel["soft_forward"]["instructions_per_element"] <= FORWARD_BAR
    assert by_kernel["soft_forward"]["overlap"] >= OVERLAP
    for kernel, factor in BACKWARD_INSTRUCTIONS.items():
        row = by_kernel[kernel]
        # Products of depth 64 + 16 + 64 on tensor cores bind: 0.0703 cycles a score, in which 9.0 instructions issue.
        assert (row["floor_unit"], row["floor_cycles_per_element"]) == ("tensor", 0.0703)
        assert max(row["cycles_per_element"].values()) <= 1.3 * row["floor_cycles_per_element"]
        assert row["instructions_per_element"] <= factor * row["unavoidable_instructions_per_element"]
    assert by_kernel["folded_forward"]["epilogue_share_of_tensor_cycles"] <= 0.10
    assert set(rows[0]) >= {
        "op", "pass", "heads", "dtype", "head_dim", "arch", "registers", "spill_bytes", "shared_bytes", "launchable",
        "tensor_cores", "instructions_per_element", "variant", "resident_blocks", "tile_use", "wave_use", "triton",
    }  # fmt: skip


MASK_AND_WINDOW = """
import torch
from corrdit.kernels.inspection import ahead_of_time, catalogue

grid = catalogue.GRID.without_text()
q = catalogue.meta_heads(catalogue.HEADS, grid.tokens, {head_dim}, torch.bfloat16)
mask = torch.empty(1, grid.tokens, dtype=torch.bool, device="meta")
with ahead_of_time.recording(90) as compiled:
    catalogue._soft_displacement(catalogue.Inputs(q, grid, "logits", None, mask, catalogue.WINDOW))()
bad = {{one.kernel for one in compiled if one.spill_bytes or one.serialized or not one.launchable}}
print(sorted(bad), len(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_mask_beside_a_window_does_not_spill(head_dim):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MASK_AND_WINDOW.format(head_dim=head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    bad, count = done.stdout.rsplit(maxsplit=1)
    assert bad == "[]"
    assert int(count) > 2


PART_OF_THE_KEYS = """
import torch
from corrdit.kernels.inspection import ahead_of_time, catalogue
from corrdit.kernels.matching.match import compute_match
from corrdit.problem import TokenAxis

grid = catalogue.GRID.without_text()
axes = TokenAxis.of_grid(grid), TokenAxis.of_range(grid, 5, 2 * grid.tokens_per_frame, text=False)
q, k = (catalogue.meta_heads(catalogue.HEADS, axis.tokens, 64, torch.bfloat16) for axis in axes)
places = [axis.places(grid.frames) for axis in axes]
with ahead_of_time.recording(90) as compiled:
    compute_match(q, k, None, None, [0, 1], *places, grid.height, grid.width, "logits", 0.12, True, 0, "ieee")
print([one.kernel for one in compiled if one.spill_bytes], len(compiled))
"""


@pytest.mark.slow
def test_a_part_of_the_keys_does_not_spill_in_matching():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PART_OF_THE_KEYS], capture_output=True, text=True, env=environment, check=True
    )
    bad, count = done.stdout.rsplit(maxsplit=1)
    assert bad == "[]"
    assert int(count) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", catalogue.HEAD_DIMS)
def test_every_kernel_on_hopper(head_dim):
    for row in compiled("--arch", "90", "--dtype", "bfloat16", "float16", "--head-dim", str(head_dim)):
        assert_sound(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 86, 89, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_elsewhere_launches(arch, dtype):
    for row in compiled("--arch", str(arch), "--dtype", dtype, "--head-dim", "64", "256"):
        assert row["launchable"], row
        assert row["tensor_cores"] or dtype == "float32", row


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tensor_cores"), [("ieee", False), ("tf32", True)])
def test_products_of_float32_use_tensor_cores_by_request_alone(precision, tensor_cores):
    rows = compiled("--op", "soft_displacement", "--dtype", "float32", "--head-dim", "64", "--precision", precision)
    assert {row["tensor_cores"] for row in rows} == {tensor_cores}


def test_rows_are_collected_and_not_compiled_again(tmp_path, monkeypatch, capsys):
    calls = []

    class Known:
        def __init__(self, request: catalogue.Request) -> None:
            self.request = request

        def report(self) -> dict[str, Any]:
            entry, dtype, head_dim, arch = self.request
            return {
                "op": entry.operation, "heads": entry.heads, "variant": entry.variant, "dtype": dtype,
                "head_dim": head_dim, "arch": arch, "registers": 17,
            }  # fmt: skip

    def compile_entry(*request: Any, precision: str) -> list[Known]:
        calls.append(request)
        return [Known(catalogue.Request(*request))]

    monkeypatch.setattr(catalogue, "compile_entry", compile_entry)
    results = tmp_path / "kernels.json"
    options = [
        "kernels",
        "--json",
        "--op",
        "match",
        "--variant",
        "plain",
        "--dtype",
        "float16",
        "--output",
        str(results),
    ]
    assert main([*options, "--head-dim", "64"]) == 0
    assert main([*options, "--head-dim", "64", "128"]) == 0
    assert [request[2] for request in calls] == [64, 64, 128, 128]
    held = json.loads(results.read_text())
    assert len(held["rows"]) == 4
    assert {"command", "commit", "triton", "sources"} <= set(held)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    assert main([*options, "--head-dim", "64", "--precision", "tf32"]) == 0
    assert len(json.loads(results.read_text())["rows"]) == 2, "rows of another precision are not these"
    results.write_text("[]")
    assert main([*options, "--head-dim", "64"]) == 2
    assert "holds something else" in capsys.readouterr().err


def test_cards_and_short_dtypes_are_understood(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(catalogue, "compile_entry", lambda *request, precision: asked.append(request[1:]) or [])
    given = ["--arch", "H100", "sm_80", "8.9", "100", "--dtype", "bf16", "half", "--head-dim", "64", "--op", "match"]
    assert main(["kernels", *given]) == 0
    assert {(dtype, arch) for dtype, _, arch in asked} == {
        (dtype, arch) for dtype in ("bfloat16", "float16") for arch in (90, 80, 89, 100)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "--arch must be one of 80, 86, 89, 90, 100, 120 (compute capabilities) or a100,"),
        (["--arch", "h10"], "got h10; did you mean h100?"),
        (["--dtype", "float64"], "--dtype must be one of float16, bfloat16, float32, got 'float64'"),
        (["--head-dim", "64", "4"], "--head-dim must be one of 8 to 256, got 4"),
        (["--head-dim", "300"], "--head-dim must be one of 8 to 256, got 300"),
        (["--variant", "loud"], "variant must be one of plain, mask, window, weights, large frame, got 'loud'"),
        (["--op", "dance"], "no operation is called 'dance'; there are attention_mass,"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_anything_is_compiled(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "compile_entry", None)
    assert main(["kernels", *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err


LAYOUTS = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 2], instrShape = [16, 8]}>
"""


@pytest.mark.parametrize(
    ("line", "times"),
    [
        ("%1 = math.exp2 %0 : tensor<128x128xf32, #mma>", 1),
        ("%1 = math.exp2 %0 : tensor<64x128xf32, #mma>", 2),
        ("%1 = math.exp2 %0 : tensor<32x16xf32, #mma1>", 1),
        ("%1 = math.exp2 %0 : tensor<16x8xf32, #mma1>", 4),
        ("%1 = math.exp2 %0 : tensor<128xf32, #ttg.slice<{dim = 1, parent = #mma}>>", 1),
        ("%1 = tt.dot %a, %b, %c : tensor<16x32xf16> * tensor<32x64xf16> -> tensor<16x64xf32, #mma1>", 2),
    ],
)
def test_scores_computed_twice_are_seen(line, times):
    assert disassembly.repetition(LAYOUTS + line) == times


def test_floors_of_soft_displacement_on_hopper():
    square = configs.Tiles(128, 128, 64, 8, 3)
    forward, query, key = (
        floors.soft_floor(name, 64, "9.0", square)
        for name in ("soft_forward", "soft_backward_query", "soft_backward_key")
    )
    assert forward == (1 / 16, "exponential", pytest.approx(3.984, abs=1e-3))
    assert query == (144 / 2048, "tensor", pytest.approx(4.047, abs=1e-3))
    assert key == (144 / 2048, "tensor", pytest.approx(4.297, abs=1e-3))
    assert floors.soft_floor("best_match", 64, "9.0", square) is None


def test_an_interpreting_process_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set"), ahead_of_time.absent_device(90):
        pass
    with (
        pytest.raises(ValueError, match="arch must be one of 80, 86, 89, 90, 100, 120, got 75"),
        ahead_of_time.absent_device(75),
    ):
        pass


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no operation is called 'nothing'"):
        list(catalogue.requests([90], ["float16"], [64], ["nothing"]))
    with pytest.raises(ValueError, match="dtype must be one of"):
        catalogue.compile_entry(catalogue.ENTRIES[0], "float64", 64, 90)


def test_tables_cover_every_kernel_on_every_architecture():
    for architecture in configs.ARCHITECTURES:
        for kernel in configs._LARGE:
            for head_dim in (8, 10, 64, 96, 128, 256):
                for element in (2, 4):
                    chosen = configs.tiles(kernel, architecture, head_dim, element)
                    assert chosen.dims <= configs.padded_head_dim(head_dim)
