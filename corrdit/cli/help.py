"""The help of a command: one screen of what most people need with --help, all of it with --help-all."""

from __future__ import annotations

import re
import shutil
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection

_WIDTH = 120
_NUMBER, _REAL = re.compile(r"\bint\b"), re.compile(r"\bfloat\b")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Paragraphs as they are written, one name for each option, and a default only where there is one to say."""

    def __init__(self, prog: str, **options: object) -> None:
        width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
        super().__init__(prog, max_help_position=min(32, width // 3), width=width)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, _value_name(action))}"

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        unset = action.default is False or action.default in (None, SUPPRESS, "", []) or not action.option_strings
        return text if unset or "%(default)" in text else f"{text} (default: %(default)s)"


def _value_name(action: Action) -> str:
    """N, X or TEXT by the type, the choices, or what the option itself says."""
    kind = str(getattr(action, "_typehint", None) or action.type)
    if isinstance(action.metavar, str):
        return action.metavar.replace(",null}", "}")
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    if re.search(r"\b(list|tuple)\[", kind):
        return "LIST"
    return "N" if _NUMBER.search(kind) else "X" if _REAL.search(kind) else "TEXT"


def shaped(
    parser: ArgumentParser, words: str, examples: Collection[str], main: Collection[str] | None, *, everything: bool
) -> None:
    """Give a parser its help, just before it is shown.

    Args:
        parser: of one command, with all its options.
        words: paragraphs. The first two, what it does and what it reads and writes, are always shown, those after
            them with everything.
        examples: calls.
        main: destinations of the options that the short help shows; None shows all.
        everything: all options and all paragraphs.
    """
    about, *further = words.strip().split("\n\n")
    calls = "\n".join(["examples:", *(f"  {example}" for example in examples)])
    shown = further if everything else further[:1]
    parser.description = "\n\n".join([about, *([calls] if examples else []), *shown])
    if everything or main is None:
        return
    hidden = [action for action in parser._actions if action.dest not in main and action.help is not SUPPRESS]
    for action in hidden:
        action.help = SUPPRESS
    parser.epilog = f"`{parser.prog} --help-all` shows {len(hidden)} further options and says more."
