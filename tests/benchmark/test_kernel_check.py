"""The check of every kernel against float64: its cases, what it finds, and where it starts."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from corrdit.benchmark import kernel_cases, kernel_check, random_cases, report
from corrdit.benchmark.kernel_cases import Case
from corrdit.cli import main

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[2]
# What a machine that only measures kernels lacks.
ABSENT = (
    "jsonargparse", "rich", "diffusers", "transformers", "lightning", "torchmetrics", "av", "imageio", "PIL", "yaml",
    "safetensors", "huggingface_hub", "matplotlib", "scipy", "pandas", "tqdm", "requests", "accelerate", "torchvision",
)  # fmt: skip


def test_the_cases_cover_what_can_be_asked():
    of_gpu = list(kernel_cases.cases(CUDA))
    for operation in kernel_cases.OPERATIONS:
        mine = [case for case in of_gpu if case.operation == operation]
        assert any(case.masked for case in mine)
        assert any("query_frames" in case.options for case in mine)
        assert any("queries" in case.options and "keys" in case.options for case in mine)
        assert any(case.heads == 4 and case.key_heads == 2 and case.undefined for case in mine)
        if operation in kernel_cases.DIFFERENTIABLE:
            assert {case.asked for case in mine} >= {"qkv", *("qkv" if operation[0] == "f" else "qk")}
            assert any(case.shards for case in mine)
            assert any("return_lse" in case.options for case in mine)
    for operation in ("soft_displacement", "hard_displacement"):
        mine = [case for case in of_gpu if case.operation == operation]
        assert {case.options.get("heads", "logits") for case in mine} == set(kernel_cases.MODES)
        assert {case.dtype for case in mine} >= set(kernel_check.TOLERANCE)
        assert {case.layout for case in mine} == set(kernel_cases.LAYOUTS)
        assert any(case.moved for case in mine)
        assert any(case.masked and "window" in case.options for case in mine)
        assert any("head_weights" in case.options for case in mine)
        assert any(case.head_dim % 16 for case in mine)
        assert {case.options["heads"] for case in mine if case.options.get("temperature") == 1.7} == set(
            kernel_cases.MODES
        )
    assert max(Counter(case.name for case in of_gpu).values()) == 1
    assert {case.precision for case in of_gpu} == {"ieee", "tf32"}


def test_options_of_compiling_and_of_the_check_are_told_apart(tmp_path, capsys):
    assert main(["kernels", "--check", "--op", "match", "--head-dim", "64"]) == 2
    assert "takes --device alone; leave out --op, --head-dim" in capsys.readouterr().err
    assert main(["kernels", "--precision", "bf16"]) == 2
    said = capsys.readouterr()
    assert "--precision must be one of ieee, tf32, got bf16" in said.err
    (tmp_path / "file").write_text("")
    assert main(["kernels", "--output", str(tmp_path / "file" / "rows.json")]) == 2
    both = capsys.readouterr()
    assert f"the folder {tmp_path / 'file'} is a file" in both.err
    assert said.out == both.out == ""


def test_the_interpreter_shows_every_mode_and_option_once():
    def about(device: torch.device) -> set[tuple[str, str]]:
        return {(case.operation, word) for case in kernel_cases.cases(device) for word in case.about.split(", ")}

    few = list(kernel_cases.cases(CPU))
    assert about(CPU) == about(CUDA) - {("soft_displacement", "tf32")}
    assert len(few) <= 100
    assert {case.dtype for case in few} == set(kernel_check.TOLERANCE)
    assert {case.layout for case in few} == set(kernel_cases.LAYOUTS)
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


SOFT = Case("soft_displacement", "", kernel_cases.SMALL_GRID, head_dim=16, options={"heads": "logits"})


@pytest.mark.parametrize("layout", kernel_cases.LAYOUTS)
def test_another_right_way_is_found_right(layout):
    case = replace(SOFT, layout=layout)
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


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"), [(torch.bfloat16, 1.01, 1.014), (torch.float16, 1.0018, 1.003)], ids=str
)
def test_a_result_may_be_off_by_the_rounding_of_its_dtype(dtype, right, wrong):
    case = replace(SOFT, dtype=dtype)
    for factor, is_right in ((right, True), (wrong, False)):

        def scaled(inputs: list[torch.Tensor], factor: float = factor) -> list[torch.Tensor]:
            moved, *gradients = case.run(inputs, "streaming")
            return [moved * factor, *gradients]

        assert (kernel_check.compare(case, CPU, scaled).wrong is None) == is_right


def test_an_infinity_of_the_other_sign_is_wrong():
    case = replace(SOFT, masked=1.0, options={"heads": "logits", "return_lse": True})
    assert kernel_check.compare(case, CPU, lambda inputs: case.run(inputs, "streaming")).wrong is None

    def spoiled(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        moved, lse, *gradients = case.run(inputs, "streaming")
        return [moved, -lse, *gradients]

    assert "result 1 is off by inf" in str(kernel_check.compare(case, CPU, spoiled).wrong)


def test_what_a_kernel_dies_of_is_wrong_and_the_others_go_on(monkeypatch):
    def dies(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("no such instruction")

    assert kernel_check.attempt(SOFT, CPU, dies).wrong == "RuntimeError: no such instruction"
    monkeypatch.setattr(kernel_check, "cases", lambda device: iter([SOFT, replace(SOFT, about="next")]))
    monkeypatch.setattr(kernel_check, "compare", lambda case, *rest: 1 / 0)
    assert [finding.wrong for finding in kernel_check.findings(CPU)] == ["ZeroDivisionError: division by zero"] * 2


@pytest.mark.slow
def test_processes_share_the_cases(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    few = [replace(SOFT, about=str(number), head_dim=16 + number) for number in range(3)]
    monkeypatch.setattr(kernel_check, "cases", lambda device: iter([*few, replace(SOFT, about="wrong", head_dim=4)]))
    *right, wrong = kernel_check.findings(CPU, workers=2)
    assert [(finding.name, finding.wrong) for finding in right] == [(case.name, None) for case in few]
    assert "the kernels take head_dim 8 to 256, got 4" in str(wrong.wrong)
    assert not wrong.fatal


def test_an_illegal_access_is_the_last_of_its_process():
    def illegal(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    assert kernel_check.attempt(SOFT, CPU, illegal).fatal
    assert not kernel_check.attempt(SOFT, CPU, lambda inputs: []).fatal


def test_a_process_that_lost_its_device_or_its_life_is_followed_by_another():
    fine = kernel_check.Finding("fine", 0.5, None)
    lost = kernel_check.Finding("lost", math.inf, "illegal access", fatal=True)
    with kernel_check._Process(CPU) as process:
        pools = []
        for finding in (fine, fine, lost, fine):
            assert process.run(finding.name, functools.partial(kernel_check.Finding, *finding)) == finding
            pools.append(process._pool)
        ended = process.run("ended", functools.partial(os._exit, 9))
        assert (ended.name, ended.wrong) == ("ended", "its process was ended from outside, or by a fault")
        assert process.run("fine", functools.partial(kernel_check.Finding, *fine)) == fine
    assert pools[0] is pools[1] is not None
    assert pools[2] is None
    assert pools[3] is not pools[0]


def test_the_worst_of_many_draws_is_told(monkeypatch):
    drawn = []

    def told(case: Case, device: torch.device) -> kernel_check.Finding:
        drawn.append(case.seed)
        return kernel_check.Finding(case.name, 0.9 - 0.2 * case.seed, "result 0 is off" if case.seed == 3 else None)

    monkeypatch.setattr(kernel_check, "attempt", told)
    assert kernel_check.drawn_again(SOFT, CPU, 3).error == 0.9
    assert kernel_check.drawn_again(SOFT, CPU).wrong == "result 0 is off"
    assert drawn[3:] == list(range(kernel_check.DRAWS))


def test_what_only_a_gpu_has_is_made_on_the_device_it_is_for(monkeypatch):
    first, second = (torch.device("cuda", index) for index in range(2))
    monkeypatch.setattr(torch, "tensor", functools.partial(lambda make, *given, device: make(*given), torch.tensor))
    card = types.SimpleNamespace(total_memory=int(1.4e11))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    made = []

    def told(case: Case, device: torch.device, run: object = None) -> kernel_check.Finding:
        made.append((case.layout, case.seed, device))
        return kernel_check.Finding(case.name, 0.5, None)

    monkeypatch.setattr(kernel_check, "attempt", told)
    special = kernel_check.special_cases(first)
    assert len({name for name, _ in special}) == len(special) == 8 * 4 + 3 + 2
    for number, (name, _) in enumerate(special):
        made.clear()
        assert kernel_check.special_finding(number, first).name == name
        assert {device for *_, device in made} == {second if "not current" in name else first}
        assert [seed for _, seed, _ in made] == list(range(kernel_check.DRAWS if "draws" in name else 1))
        assert {layout for layout, *_ in made} == {kernel_cases.FAR if "far apart" in name else Case.layout}
    assert kernel_check.special_cases(CPU) == []


def test_a_case_runs_beside_another_stream(monkeypatch):
    class Stream:
        waited = 0

        def wait_stream(self, other: Stream) -> None:
            Stream.waited += 1

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ran = []

    def on_streaming(self: Case, inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        ran.append(inputs)
        return run(self, inputs, "streaming" if backend == "triton" else backend)

    run = Case.run
    monkeypatch.setattr(Case, "run", on_streaming)
    finding = kernel_check.attempt(SOFT, CPU, functools.partial(kernel_check._beside_another_stream, SOFT))
    assert finding.wrong is None
    assert Stream.waited == 2
    assert len(ran) == 2 * kernel_check.DRAWS + 1


def test_far_heads_hold_the_same_values():
    near = torch.randn(1, 2, 3, 4).half()
    far = kernel_cases.laid_out(near, kernel_cases.FAR)
    assert torch.equal(near, far)
    assert far.stride(1) > 2**31
    assert far.double().is_contiguous()


def test_random_cases_have_every_option_of_every_operation():
    for remainder, operation in enumerate(kernel_cases.OPERATIONS):
        mine = [random_cases.random_case(number) for number in range(remainder, 600, 6)]
        assert {case.operation for case in mine} == {operation}
        assert {case.dtype for case in mine} == set(kernel_check.TOLERANCE)
        assert {case.layout for case in mine} == set(kernel_cases.LAYOUTS)
        assert {case.heads // (case.key_heads or 1) for case in mine} == {1, 2, 3}
        given = {name for case in mine for name in case.options}
        wanted = {"queries", "query_frames", "keys", "scale"}
        if operation != "frame_local_attention":
            wanted |= {"heads", "head_weights"}
            assert {case.options["heads"] for case in mine} == set(kernel_cases.MODES)
        if operation in kernel_cases.DISPLACEMENTS:
            wanted |= {"temperature", "frames", "window"}
            assert any(case.moved for case in mine)
        if operation in kernel_cases.DIFFERENTIABLE:
            wanted.add("return_lse")
            assert any(case.shards for case in mine)
        assert given >= wanted


def test_random_cases_are_right_where_the_way_is():
    """Another way than the reference to answer them, which needs no interpreter."""
    for number in range(60):
        case = random_cases.random_case(number)
        finding = kernel_check.compare(case, CPU, lambda inputs, case=case: case.run(inputs, "streaming"))
        assert finding.wrong is None, (case, finding)


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


@pytest.mark.parametrize(("given", "device"), [([], "cuda:0"), (["cuda"], "cuda:0"), (["cuda:1"], "cuda:1")])
def test_the_check_is_of_one_cuda_device(monkeypatch, capsys, given, device):
    from torch.cuda import _utils

    from corrdit.benchmark import environment
    from corrdit.cli import devices, main

    current, checked = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "usable_devices", lambda **options: ["cpu", "cuda", "cuda:0", "cuda:1"])
    # As torch itself does, which takes no device without an index.
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(_utils._get_device_index(device)))
    monkeypatch.setattr(environment, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        kernel_check,
        "findings",
        lambda device: checked.append(device) or iter([kernel_check.Finding("soft", 0.5, None)]),
    )
    assert main(["kernels", "--check", *(["--device", *given] if given else [])]) == 0
    assert checked == [torch.device(device)]
    assert current == [torch.device(device).index]
    assert "a GPU" in capsys.readouterr().out


def test_a_device_without_a_check_is_refused(capsys):
    from corrdit.cli import main

    assert main(["kernels", "--device", "cpu"]) == 2
    assert "--device says where --check runs" in capsys.readouterr().err


def test_a_share_above_the_limit_is_flagged():
    assert report.percent(1.04) == "104 %"
    assert report.percent(4.14) == "414 % (the limit was measured too low)"
