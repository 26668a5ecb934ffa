"""What mkdocs does to the pages before it renders them."""

from __future__ import annotations

import importlib
import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
PUBLIC = re.compile(r"<!-- public names of ([\w.]+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Public names in place of their mark; links out of `docs/`, where the site has nothing, become paths."""
    markdown = OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2]}`)" if link[1] != link[2] else f"`{link[2]}`", markdown)
    return PUBLIC.sub(lambda mark: "\n".join(entries(mark[1])), markdown)


def entries(name: str) -> list[str]:
    """A line for mkdocstrings for each function and class that a module offers, by the file where it is defined."""
    module = importlib.import_module(name)
    offered = [getattr(module, attribute) for attribute in module.__all__]
    return [f"::: {value.__module__}.{value.__qualname__}" for value in offered if hasattr(value, "__qualname__")]
