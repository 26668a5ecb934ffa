"""The command line: `corrdit COMMAND ...`.

Each command is a module of this package, see `Command`. None of them imports anything heavy before it is called, so
that `corrdit --help` needs neither torch nor jsonargparse.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from corrdit.cli import (
    analyze,
    bench,
    calibrate,
    demo,
    doctor,
    evaluate,
    generate,
    kernels,
    models,
    track,
    train,
    transfer,
    world,
)
from corrdit.cli.signals import handle_signals

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class Command(Protocol):
    """A module that is a command; its docstring says what it reads and writes, and `USAGE`, if it is there, how."""

    __name__: str
    HELP: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: Namespace) -> int:
        """Do it; gives the exit status."""


_IN_ORDER: tuple[Command, ...] = (
    *(track, demo, analyze, calibrate, evaluate, train, generate, transfer, world),
    *(bench, kernels, models, doctor),
)
MODULES = {module.__name__.rpartition(".")[2]: module for module in _IN_ORDER}
COMMANDS = {name: module.HELP for name, module in MODULES.items()}
"""What each command does, in one line."""

_SUCCESS, _FAILURE, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130
_OVERVIEW = """\
usage: corrdit COMMAND [options]
       corrdit --version

Point correspondence, guidance and motion transfer from the attention of video diffusion transformers.

commands:
{commands}

`corrdit COMMAND --help` tells what a command reads and writes. Exit status: 0 success, 2 bad input, 130 Ctrl-C.
Errors are one line; --traceback after any command, or CORRDIT_DEBUG=1, shows where they come from."""


def entry_point() -> None:
    """The console script `corrdit`."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    handle_signals()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; nothing but the handling of signals depends on the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--traceback" in arguments or os.environ.get("CORRDIT_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return _SUCCESS
    if arguments[0] in ("-V", "--version", "version"):
        from corrdit.version import __version__

        print(f"corrdit {__version__}")
        return _SUCCESS
    command = arguments[0]
    if command not in MODULES:
        return _unknown_command(command)
    with _one_line_warnings(command):
        return _run_guarded(command, arguments[1:], debug)


def _run_guarded(command: str, arguments: list[str], debug: bool) -> int:
    """Run a command and turn every exception into one line and an exit status."""
    caught: BaseException
    try:
        status = _run(command, arguments)
        sys.stdout.flush()
        return status
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else _SUCCESS if stop.code is None else _BAD_INPUT
    except BrokenPipeError:
        # the reader of our output has gone, as `corrdit models | head -1` does; keep Python from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SUCCESS
    except KeyboardInterrupt as error:
        message, status, caught = "stopped by Ctrl-C; nothing unfinished was left behind", _INTERRUPTED, error
    except Exception as error:
        message, status, caught = _one_line(error), _BAD_INPUT, error
        if not _is_bad_input(error):
            message = f"{type(error).__name__}: {message} (--traceback shows where this comes from)"
            status = _FAILURE
    if debug:
        traceback.print_exception(caught)
    print(f"corrdit {command}: {message}", file=sys.stderr)
    return status


def _run(command: str, arguments: list[str]) -> int:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    module = MODULES[command]
    parser = ArgumentParser(
        prog=f"corrdit {command}",
        usage=f"corrdit {command} {getattr(module, 'USAGE', '[options]')}",
        description=module.__doc__ or module.HELP,
        # Keeps the paragraphs of the description as they are written.
        formatter_class=type("HelpFormatter", (RawDescriptionHelpFormatter, DefaultHelpFormatter), {}),
        exit_on_error=False,
    )
    module.add_arguments(parser)
    if not any("--config" in action.option_strings for action in parser._actions):
        parser.add_argument("--config", action="config", help="YAML file with values for these options")
    return int(module.run(parser.parse_args(arguments)))


def _is_bad_input(error: Exception) -> bool:
    from argparse import ArgumentError

    from corrdit.memory import is_out_of_memory

    return isinstance(error, (ValueError, OSError, ImportError, ArgumentError)) or is_out_of_memory(error)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _unknown_command(command: str) -> int:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"corrdit: there is no command {command!r}{hint} Commands are {', '.join(COMMANDS)}.", file=sys.stderr)
    return _BAD_INPUT


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    return _OVERVIEW.format(commands="\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items()))


@contextlib.contextmanager
def _one_line_warnings(command: str) -> Iterator[None]:
    """Show our warnings as one line each, and not those that libraries address to their developers."""

    def show(message: Warning | str, category: type[Warning], *place: object, **options: object) -> None:
        print(f"corrdit {command}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield
