"""The script for a lent GPU: what it runs in which order, and what it says where it cannot start."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(gpu, monkeypatch, tmp_path) -> Callable[..., tuple[int, list[str]]]:
    """Runs the script with the exit statuses of the commands it starts: the status, and what it started."""
    monkeypatch.setattr(gpu, "commit", lambda: "0123456")

    def start(check: int = 0, bench: tuple[int, ...] = (0,), options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        started: list[str] = []
        left = list(bench)

        def corrdit(*arguments: str, log: Path | None = None) -> int:
            kind = "plan" if "--plan" in arguments else arguments[0]
            started.append(kind)
            if kind == "kernels":
                assert log == tmp_path / "out" / "check.txt"
            if kind == "bench":
                assert "--resume" in arguments
                assert float(arguments[arguments.index("--minutes") + 1]) <= gpu.PIECE_MINUTES
            return {"plan": lambda: 0, "kernels": lambda: check, "bench": lambda: left.pop(0)}[kind]()

        monkeypatch.setattr(gpu, "corrdit", corrdit)
        monkeypatch.setattr(
            sys, "argv", ["gpu.py", "--output", str(tmp_path / "out"), "--device", "cpu", "--shapes", "tiny", *options]
        )
        return gpu.main(), started

    return start


def test_it_plans_checks_and_measures_in_pieces_until_all_is_done(run):
    assert run(bench=(3, 3, 0)) == (0, ["plan", "kernels", "bench", "bench", "bench"])
    # What was checked at this commit is not checked again.
    assert run(bench=(0,)) == (0, ["plan", "bench"])


def test_a_wrong_kernel_is_not_forgotten_and_keeps_no_other_from_being_timed(run):
    for _ in range(2):
        assert run(check=1, bench=(3, 0)) == (1, ["plan", "kernels", "bench", "bench"])


def test_the_status_of_the_benchmark_is_its_own(run):
    assert run(bench=(1,)) == (1, ["plan", "kernels", "bench"])
    status, started = run(bench=(3,), options=("--minutes", "0"))
    assert (status, started) == (3, ["plan"])


def test_another_commit_or_none_is_checked_again(run, gpu, monkeypatch):
    run()
    monkeypatch.setattr(gpu, "commit", lambda: "89abcde")
    assert run()[1] == ["plan", "kernels", "bench"]
    monkeypatch.setattr(gpu, "commit", lambda: None)
    for _ in range(2):
        assert run()[1] == ["plan", "kernels", "bench"]


def test_a_machine_without_a_gpu_or_a_package_is_told_so(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out")])
    assert gpu.main() == 2
    assert "finds no CUDA device here; --device cpu tries the same without one" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    assert "no_such_package cannot be imported" in str(gpu.cannot_start("cpu"))


def test_an_output_that_is_no_folder_is_said(gpu, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "file"), "--device", "cpu"])
    assert gpu.main() == 2
    assert capsys.readouterr().err == f"gpu.py: --output {tmp_path / 'file'} cannot be made a folder: File exists\n"


def test_what_a_command_prints_is_shown_and_kept(gpu, tmp_path, capfd):
    log = tmp_path / "log.txt"
    assert gpu.corrdit("no-such-command", log=log) == 2
    assert "no-such-command" in log.read_text(encoding="utf-8")
    assert "no-such-command" in capfd.readouterr().out
