"""Shell completion of commands, options, their choices, model names and files: `corrdit --print-completion bash`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Callable, Mapping

SHELLS = ("bash", "zsh", "tcsh")
_PATH = re.compile(r"FILE|DIR|PATH|VIDEO|REFERENCE|MASK")


def completion_script(
    shell: str, commands: Mapping[str, str], parser_of: Callable[[str], argparse.ArgumentParser]
) -> str:
    """The script that a shell sources, by shtab.

    Args:
        shell: of `SHELLS`.
        commands: what each does, by name.
        parser_of: gives the parser of a command.

    Raises:
        ValueError: another shell, or shtab is not installed.
    """
    if shell not in SHELLS:
        raise ValueError(f"--print-completion {shell or '(nothing)'} was given; accepted are {', '.join(SHELLS)}")
    if importlib.util.find_spec("shtab") is None:
        raise ValueError('completion needs shtab, which is not installed; pip install ".[completion]" in a checkout')
    # No backbone is loaded, and where libraries warn about the machine the script stays clean.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import shtab

    from corrdit.integrations.diffusers import available_backbones

    models = [str(backbone["name"]) for backbone in available_backbones()]
    root = argparse.ArgumentParser("corrdit")
    root.add_argument("--version", action="store_true", help="show the version")
    added = root.add_subparsers(metavar="COMMAND")
    for name, words in commands.items():
        added.add_parser(name, help=words)
        parser = parser_of(name)
        added._name_parser_map[name] = parser
        for action in parser._actions:
            if action.dest == "model":
                action.choices = models
            elif _PATH.search(str(action.metavar)) and action.choices is None:
                vars(action)["complete"] = shtab.FILE
    return str(shtab.complete(root, shell=shell))
