"""How many frames of what size: the same options for every command that makes or encodes frames."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from typing import TYPE_CHECKING, Any

from corrdit.cli.earlier_names import add_earlier_name

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from argparse import _ArgumentGroup as ArgumentGroup

_COUNT: Any = int | None


def frame_size(text: str | list[int] | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of "480x720", or of a pair as a configuration file has it."""
    found = re.fullmatch(r"(\d{1,6})[x×,](\d{1,6})", text) if isinstance(text, str) else None
    pair = found.groups() if found else text
    if isinstance(pair, str) or len(pair) != 2:
        raise ArgumentTypeError(f"{text} is not a size; accepted is HEIGHTxWIDTH in pixels, such as 480x720")
    return int(pair[0]), int(pair[1])


def add_size_option(parser: ArgumentParser | ArgumentGroup, words: str, default: str | None = None) -> None:
    """--size, whose sides the command finds as `height` and `width`, and both by their earlier names."""
    parser.add_argument("--size", type=frame_size, default=default, metavar="HEIGHTxWIDTH", help=words)
    for side in ("height", "width"):
        add_earlier_name(parser, side, "size", type=int | None)


def add_num_frames_option(parser: ArgumentParser | ArgumentGroup, words: str, default: int | None = None) -> None:
    """--num-frames, and its earlier name --frames."""
    parser.add_argument("--num-frames", type=_COUNT, default=default, metavar="N", help=words)
    add_earlier_name(parser, "frames", "num-frames", type=int | None)
