"""The dispatcher: quick help, one-line errors, exit status, signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import corrdit.cli
from corrdit.cli import COMMANDS, main

CORRDIT = Path(sys.executable).with_name("corrdit")
HARNESS = """
import signal
# A suite that a shell runs in the background inherits an ignored SIGINT, and so would the command.
signal.signal(signal.SIGINT, signal.default_int_handler)
import sys, time
from types import SimpleNamespace
import corrdit.cli, corrdit.tracking, corrdit.integrations.diffusers.backbones.loading

class Endless:
    def __init__(self, backbone, **options):
        pass

    def track(self, video, queries, **options):
        print("tracking", flush=True)
        time.sleep(60)

vars(corrdit.tracking)["PointTracker"] = Endless
backbone = SimpleNamespace(name="embedded", fingerprint=str)
corrdit.integrations.diffusers.backbones.loading.load_backbone = lambda name, **options: backbone
sys.argv[0] = "corrdit"
corrdit.cli.entry_point()
"""


def test_help_needs_no_heavy_module() -> None:
    code = (
        "import sys; sys.path.pop(0); from corrdit.cli import main; assert main(['--help']) == 0;"
        "assert main(['--version']) == 0;"
        "heavy = {'torch', 'numpy', 'jsonargparse', 'matplotlib', 'diffusers', 'lightning', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, text in COMMANDS.items():
        assert name in done.stdout
        assert text in done.stdout
    assert f"corrdit {corrdit.__version__}" in done.stdout


def test_console_script_and_status() -> None:
    done = subprocess.run(
        [CORRDIT, "track", "nowhere.mp4", "--output", "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("corrdit track: there is no file or folder nowhere.mp4; accepted are mp4")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    module: Any = corrdit.cli.MODULES[command]
    assert COMMANDS[command] == module.HELP
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: corrdit {command}")
    assert text.count("\n") <= 50
    assert "null" not in text
    assert text.index("examples:") < text.index("\nreads ") < text.index("\noptions:")
    assert "\nwrites " in text
    assert main([command, "--help-all"]) == 0
    everything = capsys.readouterr().out
    parser = corrdit.cli.command_parser(command)
    shown = [action for action in parser._actions if action.help != "==SUPPRESS=="]
    assert all(option in everything for action in shown for option in action.option_strings[:1])
    assert set(getattr(module, "MAIN", ())) <= {action.dest for action in parser._actions}


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_are_accepted(command: str) -> None:
    for example in corrdit.cli.MODULES[command].EXAMPLES:
        name, *words = shlex.split(example)[1:]
        if "--config" in words:  # names a file of the package, which the command looks up
            del words[words.index("--config") : words.index("--config") + 2]
        corrdit.cli.command_parser(name).parse_args(words)


def test_completion_knows_commands_options_and_models(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    assert main(["--print-completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        call = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_corrdit; "
        done = subprocess.run(
            ["bash", "-c", call + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("corrdit", "tra") == ["track", "train", "transfer"]
    assert completed("corrdit", "track", "--model", "cog") == ["cogvideox-2b", "cogvideox-5b"]
    assert completed("corrdit", "generate", "text", "--num") == ["--num-frames"]
    assert completed("corrdit", "track", "video", "--low") == ["--low-pass"]  # one that only --help-all shows


def test_completion_names_its_shells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "dish"]) == 2
    assert "--print-completion dish was given; accepted are bash, zsh, tcsh" in capsys.readouterr().err


def test_no_command_prints_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trak"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("corrdit: there is no command 'trak'; did you mean track? Commands are track, demo")
    assert error.count("\n") == 1


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command that does what the test puts into its `run`."""
    module = types.ModuleType("corrdit.cli.experiment", "reads and writes nothing")
    module.HELP = "experiment"  # type: ignore[attr-defined]
    module.EXAMPLES = ()  # type: ignore[attr-defined]
    module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
    monkeypatch.setitem(corrdit.cli.MODULES, "experiment", module)
    return module


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("two\n  lines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "No such file or directory: a.txt"),
        (ModuleNotFoundError("No module named 'diffusers'"), 2, "No module named 'diffusers'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "DefaultCPUAllocator: can't allocate memory"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; nothing unfinished was left behind"),
        (KeyError("layer"), 1, "KeyError: 'layer' (--traceback shows where this comes from)"),
    ],
)
def test_errors_are_one_line(
    command: Any, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def run(arguments: Any) -> int:
        raise error

    command.run = run
    assert main(["experiment"]) == status
    assert capsys.readouterr().err == f"corrdit experiment: {line}\n"


@pytest.mark.parametrize("by_variable", [False, True])
def test_traceback_on_request(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    def run(arguments: Any) -> int:
        raise ValueError("wrong number")

    command.run = run
    if by_variable:
        monkeypatch.setenv("CORRDIT_DEBUG", "1")
    assert main(["experiment"] if by_variable else ["experiment", "--traceback"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("corrdit experiment: wrong number\n")


def test_warnings_are_one_line(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    def run(arguments: Any) -> int:
        warnings.warn("the file seems\nto be cut off")
        warnings.warn("use another name", DeprecationWarning)
        return 0

    command.run = run
    assert main(["experiment"]) == 0
    assert capsys.readouterr().err == "corrdit experiment: warning: the file seems to be cut off\n"


@pytest.mark.parametrize(
    "number, status",
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_signals_leave_nothing_behind(tmp_path: Path, clip: Path, number: signal.Signals, status: int) -> None:
    (tmp_path / "harness.py").write_text(HARNESS)
    output = tmp_path / "results" / "out"
    process = subprocess.Popen(
        [sys.executable, tmp_path / "harness.py", "track", clip, "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "tracking\n"
    assert any(name.name.endswith(".part") for name in output.parent.iterdir()), "written beside"
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert time.monotonic() - began < 20
    assert (
        error
        == {
            130: "corrdit track: stopped by Ctrl-C; nothing unfinished was left behind\n",
            143: "corrdit track: stopped by SIGTERM; nothing unfinished was left behind\n",
            129: "corrdit track: stopped by SIGHUP; nothing unfinished was left behind\n",
        }[status]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harness.py"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away(unbuffered: str) -> None:
    """`corrdit doctor | head -1` is no error."""
    code = f"{CORRDIT} doctor | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_end_of_a_forked_worker_is_not_the_end_of_the_command() -> None:
    code = """
import os, signal, time
from corrdit.cli.signals import SECONDS_TO_UNWIND, handle_signals
handle_signals()
worker = os.fork()
if worker == 0:
    time.sleep(60)
time.sleep(1)
os.kill(worker, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 143
time.sleep(SECONDS_TO_UNWIND + 1)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.parametrize(
    "number, status", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_signals_end_one_long_operation_of_torch(tmp_path: Path, number: signal.Signals, status: int) -> None:
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from corrdit.cli.signals import handle_signals
from corrdit.files import OutputFolder, written_beside
handle_signals()
query = torch.zeros(1, 1, 1_000_000, 16)
with OutputFolder(sys.argv[1] + "/made/out") as folder, written_beside(sys.argv[1] + "/state") as file:
    (folder / "half").touch()
    print("attending", flush=True)
    torch.nn.functional.scaled_dot_product_attention(query, query, query)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "attending\n"
    assert len(list(tmp_path.iterdir())) == 2
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert time.monotonic() - began < 20
    assert (
        error == f"corrdit: stopped by {'Ctrl-C' if status == 130 else 'SIGTERM'}; nothing unfinished was left behind\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_type_error_that_is_said_is_bad_input_and_one_that_happens_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from corrdit import PointTracker
    from corrdit.cli import models

    for run, status, said in (
        (lambda arguments: PointTracker(3), 2, "corrdit models: backbone must be what corrdit.load_backbone returns"),
        (lambda arguments: len(3), 1, "TypeError: object of type 'int' has no len() (--traceback shows"),
    ):
        monkeypatch.setattr(models, "run", run)
        assert main(["models"]) == status
        assert said in capsys.readouterr().err
