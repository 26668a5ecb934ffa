"""The command line: `corrdit COMMAND ...`.

Each command is a module of this package, see `Command`. None of them imports anything heavy before it is called, so
that `corrdit --help` needs neither torch nor jsonargparse.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import linecache
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from corrdit.cli import (
    analyze,
    bench,
    calibrate,
    demo,
    doctor,
    evaluate,
    explore,
    generate,
    kernels,
    models,
    plan,
    track,
    train,
    transfer,
    world,
)
from corrdit.cli.earlier_names import take_earlier_names
from corrdit.cli.help import HelpFormatter, shaped
from corrdit.cli.signals import Stopped, handle_signals
from corrdit.files import refuse_nested_aliases
from corrdit.progress import hidden_bars

if TYPE_CHECKING:
    from argparse import Action

    from jsonargparse import ArgumentParser, Namespace


class Command(Protocol):
    """A module that is a command.

    Its docstring says what it does, in a second paragraph what it reads and writes, and in further ones what only
    --help-all shows. `USAGE` and `MAIN`, if they are there, are how it is called and the options of the short help.
    """

    __name__: str
    HELP: str

    @property
    def EXAMPLES(self) -> tuple[str, ...]:
        """Calls that the help shows first."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, arguments: Namespace) -> int:
        """Do it; gives the exit status."""


_IN_ORDER: tuple[Command, ...] = (
    *(track, demo, explore, analyze, calibrate, evaluate, train, generate, transfer, world),
    *(plan, bench, kernels, models, doctor),
)
MODULES = {module.__name__.rpartition(".")[2]: module for module in _IN_ORDER}
COMMANDS = {name: module.HELP for name, module in MODULES.items()}
"""What each command does, in one line."""

# Commands whose options are argparse's own: they start where torch, triton and numpy alone are installed.
_PLAIN = ("bench", "kernels")
_SUCCESS, _FAILURE, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130
_LIST = re.compile(r"\b(tuple|list)\[")
_NUMBERS = re.compile(r"-?[\d.]+(,-?[\d.]+)+")
_OVERVIEW = """\
usage: corrdit COMMAND [options]
       corrdit --version

Point correspondence, guidance and motion transfer from the attention of video diffusion transformers.

commands:
{commands}

`corrdit COMMAND --help` tells what a command reads and writes, --help-all every option. Exit status: 0 success,
1 a fault of ours, 2 bad input, 130 Ctrl-C. `corrdit --print-completion bash` (or zsh, tcsh) completes as you type.
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
    if not arguments or arguments[0] in ("-h", "--help", "--help-all", "help"):
        print(_overview())
        return _SUCCESS
    if arguments[0] in ("-V", "--version", "version"):
        from corrdit.version import __version__

        print(f"corrdit {__version__}")
        return _SUCCESS
    if arguments[0] == "--print-completion":
        with _one_line_warnings("--print-completion"):
            return _run_guarded("--print-completion", arguments[1:], debug)
    command = arguments[0]
    if command not in MODULES:
        return _unknown_command(command)
    with _one_line_warnings(command), hidden_bars():  # commands have bars of their own
        return _run_guarded(command, arguments[1:], debug)


def _run_guarded(command: str, arguments: list[str], debug: bool) -> int:
    """Run a command and turn every exception into one line and an exit status."""
    caught: BaseException
    try:
        status = _run(command, arguments)
        sys.stdout.flush()
        return status
    except Stopped as stop:
        print(f"corrdit {command}: stopped by {stop.name}; nothing unfinished was left behind", file=sys.stderr)
        return int(stop.code)
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
    from importlib.util import find_spec

    if command == "--print-completion":
        from corrdit.cli.completion import completion_script

        print(completion_script(" ".join(arguments), COMMANDS, command_parser))
        return _SUCCESS
    if command in _PLAIN and find_spec("jsonargparse") is None:
        parsed = command_parser(command, arguments, plain=True).parse_args(arguments)
        return int(MODULES[command].run(parsed))  # type: ignore[arg-type]
    parser = command_parser(command, arguments)
    options = {name: action for action in parser._actions for name in action.option_strings}
    for before, after in zip(arguments, [*arguments[1:], ""], strict=False):
        config = Path(after if before == "--config" else before.removeprefix("--config="))
        if before.startswith("--config") and config.is_file():
            refuse_nested_aliases(config.read_bytes(), str(config))
    try:
        parsed = parser.parse_args(_with_joined_values(arguments, options))
    except Exception as error:
        example = MODULES[command].EXAMPLES[0]
        raise ValueError(_parser_words(_one_line(error), parser._actions, example)) from error
    if parsed.get("output") == "":
        raise ValueError("--output is an empty name; give that of a folder or file, which is made if need be")
    take_earlier_names(parser, parsed)
    parsed.called = shlex.join(["corrdit", command, *arguments])
    return int(MODULES[command].run(parsed))


def command_parser(command: str, arguments: Sequence[str] = (), *, plain: bool = False) -> ArgumentParser:
    """The parser of a command, with its help as the arguments ask for it.

    Args:
        command: its name.
        arguments: those of the call, for `--help` and `--help-all`.
        plain: by argparse alone, for a machine that only measures kernels and has no jsonargparse.
    """
    module, everything = MODULES[command], "--help-all" in arguments
    prog = f"corrdit {command}"
    usage = f"{prog} {getattr(module, 'USAGE', '[options]')}"
    parser: Any
    if plain:
        parser = argparse.ArgumentParser(prog=prog, usage=usage, formatter_class=HelpFormatter)
    else:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog=prog, usage=usage, formatter_class=HelpFormatter, exit_on_error=False)
    parser.add_argument("--help-all", action="help", help="show every option")
    module.add_arguments(parser)
    if not plain and not any("--config" in action.option_strings for action in parser._actions):
        parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with values for these options")
    if {"-h", "--help", "--help-all"} & {*arguments}:
        main = getattr(module, "MAIN", None)
        shaped(parser, module.__doc__ or module.HELP, module.EXAMPLES, main, everything=everything)
    return cast("ArgumentParser", parser)


def _with_joined_values(arguments: Sequence[str], options: Mapping[str, Action]) -> list[str]:
    """Values that begin with a minus joined to their option, and 1,2 put in brackets where a list is meant."""
    lists = {name for name, action in options.items() if _LIST.search(str(getattr(action, "_typehint", "")))}
    joined: list[str] = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        before = joined[-1] if joined else ""
        if name in lists and _NUMBERS.fullmatch(value):
            joined.append(f"{name}=[{value}]")
        elif before in lists and _NUMBERS.fullmatch(argument):
            joined[-1] = f"{before}=[{argument}]"
        elif before in options and re.match(r"-[\d.]", argument):
            joined[-1] = f"{before}={argument}"
        else:
            joined.append(argument)
    return joined


def _parser_words(message: str, actions: Sequence[Action], example: str) -> str:
    """What the parser refused, by the options as they are typed, with the nearest one for one that does not exist."""
    names = {action.dest: (action.option_strings or [str(action.metavar or action.dest)])[-1] for action in actions}
    shown = {
        action.dest: f"{names[action.dest]} {action.metavar}"
        for action in actions
        if action.option_strings and action.metavar
    }
    if required := re.search(r"the following arguments are required: (.*)", message):
        missing = [shown.get(name, names.get(name, name)) for name in required[1].split(", ")]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required, as in: {example}"
    message = re.sub(r'Parser key "([\w.]+)"', lambda found: names.get(found[1], found[1]), message)
    unknown = re.search(r"unrecognized arguments: (--[\w-]+)|Option '([\w-]+)' is not accepted", message)
    if unknown is None:
        return message
    near = difflib.get_close_matches((unknown[1] or f"--{unknown[2]}"), [*names.values()], n=1)
    return f"{message}; did you mean {near[0]}?" if near else message


def _is_bad_input(error: Exception) -> bool:
    from argparse import ArgumentError

    from corrdit.memory import is_out_of_memory
    from corrdit.ops.backends import BackendUnavailableError

    bad = (ValueError, OSError, ImportError, ArgumentError, BackendUnavailableError)
    return isinstance(error, bad) or is_out_of_memory(error) or _is_refusal(error)


def _is_refusal(error: Exception) -> bool:
    """Whether a TypeError says what was given and what is accepted, and is not a mistake in the code."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if not isinstance(error, TypeError) or place is None:
        return False
    ours = str(place.tb_frame.f_globals.get("__name__")).partition(".")[0] == "corrdit"
    line = linecache.getline(place.tb_frame.f_code.co_filename, place.tb_lineno)
    return ours and line.lstrip().startswith("raise TypeError")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _unknown_command(command: str) -> int:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
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
