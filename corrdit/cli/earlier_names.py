"""Options under the names they had: accepted until the next version but one, not shown, with one warning each."""

from __future__ import annotations

import warnings
from argparse import SUPPRESS
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from argparse import _ArgumentGroup as ArgumentGroup

REMOVED_IN = "0.3"


def add_earlier_name(parser: ArgumentParser | ArgumentGroup, old: str, new: str, **options: Any) -> None:
    """`--old`, whose value `take_earlier_names` gives to `--new`, by both as they are typed."""
    action = parser.add_argument(f"--{old}", default=None, help=SUPPRESS, **options)
    vars(action)["now"] = new


def take_earlier_names(parser: ArgumentParser, arguments: Namespace) -> None:
    """Move values that were given under earlier names, with a warning that names the new one.

    --height and --width stay beside the --size that they became, which is shared out to them.
    """
    given = vars(arguments)
    earlier = {action.dest: vars(action)["now"] for action in parser._actions if "now" in vars(action)}
    used = {name: new for name, new in earlier.items() if given[name] is not None}
    sides = [name for name in ("height", "width") if used.get(name) == "size"]
    if sides:
        _warn(f"--{sides[0]}", "--size HEIGHTxWIDTH")
    for name, new in used.items():
        if name not in sides:
            _warn(f"--{name.replace('_', '-')}", f"--{new}")
            given[new.replace("-", "_")] = given[name]
    if earlier.get("height") == "size" and given["size"] is not None:
        for name, length in zip(("height", "width"), given["size"], strict=True):
            given[name] = length if given[name] is None else given[name]


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name goes in corrdit {REMOVED_IN}", stacklevel=3)
