"""The check of every kernel against float64: its cases, what it finds, and where it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from corrdit.benchmark import kernel_check, report
from corrdit.benchmark.kernel_check import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]
# What a machine that only measures kernels lacks.
ABSENT = (
    "jsonargparse", "rich", "diffusers", "transformers", "lightning", "torchmetrics", "av", "imageio", "PIL", "yaml",
    "safetensors", "huggingface_hub", "matplotlib", "scipy", "pandas", "tqdm", "requests", "accelerate", "torchvision",
)  # fmt: skip


def test_the_cases_cover_what_can_be_asked():
    of_gpu = list(kernel_check.cases(CUDA))
    assert {case.operation for case in of_gpu} == {
        "soft_displacement", "hard_displacement", "match", "cost_rows", "attention_mass", "frame_local_attention",
    }  # fmt: skip
    for operation in ("soft_displacement", "hard_displacement"):
        mine = [case for case in of_gpu if case.operation == operation]
        assert {case.options.get("heads", "logits") for case in mine} == set(kernel_check.MODES)
        assert {case.dtype for case in mine} >= set(kernel_check.TOLERANCE)
        assert {case.layout for case in mine} == set(kernel_check.LAYOUTS)
        assert any(case.moved for case in mine)
        assert any(case.masked and "window" in case.options for case in mine)
        assert any("head_weights" in case.options for case in mine)
        assert any(case.head_dim % 16 for case in mine)
    assert max(Counter(case.name for case in of_gpu).values()) == 1
    assert {case.precision for case in of_gpu} == {"ieee", "tf32"}


def test_the_interpreter_shows_every_mode_and_option_once():
    def about(device: torch.device) -> set[tuple[str, str]]:
        return {(case.operation, word) for case in kernel_check.cases(device) for word in case.about.split(", ")}

    few = list(kernel_check.cases(CPU))
    assert about(CPU) == about(CUDA) - {("soft_displacement", "tf32")}
    assert len(few) <= 80
    assert {case.dtype for case in few} == set(kernel_check.TOLERANCE)
    assert {case.layout for case in few} == set(kernel_check.LAYOUTS)
    assert any(case.key_heads and "return_lse" in case.options and "queries" in case.options for case in few)


@pytest.mark.slow
def test_the_kernels_are_right_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run(
        [sys.executable, "-m", "corrdit", "kernels", "--check", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cases are right" in done.stdout


SOFT = Case("soft_displacement", "", kernel_check._SMALL_GRID, head_dim=16, options={"heads": "logits"})


@pytest.mark.parametrize("layout", kernel_check.LAYOUTS)
def test_another_right_way_is_found_right(layout):
    case = Case(**{**vars(SOFT), "layout": layout})
    finding = kernel_check.compare(case, CPU, lambda inputs: case.run(inputs, "streaming"))
    assert finding.wrong is None
    assert finding.error < 1


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (lambda found: [found[0] * 1.05, *found[1:]], "result 0 is off"),
        (lambda found: [*found[:2], found[2].index_fill(2, torch.tensor([9]), 0.0)], "gradient of k is off"),
        (lambda found: [found[0].index_fill(3, torch.tensor([1]), float("nan")), *found[1:]], "result 0 is off by inf"),
        (lambda found: [found[0][:, :1], *found[1:]], "result 0 has shape"),
    ],
)
def test_a_wrong_result_is_found(spoil, wrong):
    finding = kernel_check.compare(SOFT, CPU, lambda inputs: spoil(SOFT.run(inputs, "streaming")))
    assert wrong in str(finding.wrong)


BARE = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {ABSENT!r} else found(name, package)
"""


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where torch, triton, numpy and einops alone are installed."""
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, env=environment, cwd="/", check=False
    )


def test_the_check_and_the_benchmark_run_with_torch_triton_and_numpy_alone(tmp_path):
    done = bare(f"""
import os
os.environ["TRITON_INTERPRET"] = "1"
from corrdit.benchmark import kernel_check
sound = kernel_check.cases
def few(device):
    chosen = [case for case in sound(device) if case.operation == "attention_mass"][:1]
    return iter(chosen)
kernel_check.cases = few
from corrdit.cli import main
assert main(["kernels", "--check", "--device", "cpu"]) == 0
assert main(["bench", "--device", "cpu", "--shapes", "tiny", "--operations", "attention_mass", "--baselines", "none",
             "--rounds", "1", "--output", {str(tmp_path)!r}]) == 0
assert main(["bench", "--plan", "--device", "cuda"]) == 0
""")
    assert done.returncode == 0, done.stderr
    assert "1 cases are right" in done.stdout
    assert "no pictures without matplotlib" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["rows"]


def test_a_wrong_kernel_ends_the_check_with_status_1(monkeypatch, capsys):
    from corrdit.cli import main

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(
        kernel_check, "findings", lambda device: iter([kernel_check.Finding("match", 7.0, "result 0 is off")])
    )
    assert main(["kernels", "--check", "--device", "cpu"]) == 1
    assert "wrong: match: result 0 is off" in capsys.readouterr().err


def test_a_device_without_a_check_is_refused(capsys):
    from corrdit.cli import main

    assert main(["kernels", "--device", "cpu"]) == 2
    assert "--device says where --check runs" in capsys.readouterr().err


def test_a_share_above_the_limit_is_flagged():
    assert report.percent(1.04) == "104 %"
    assert report.percent(4.14) == "414 % (the limit was measured too low)"
