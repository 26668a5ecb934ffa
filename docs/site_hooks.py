"""What mkdocs does to the pages before it renders them."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")
NOTEBOOK_LINK = re.compile(r"\]\((notebooks/[\w-]+)\.ipynb\)")
NOTEBOOKS = pathlib.Path(__file__).parent / "notebooks"
PUBLIC = re.compile(r"<!-- public names of ([\w.]+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Public names in place of their mark; links to notebooks lead to their pages, and those out of `docs/`, where the
    site has nothing, become paths."""
    markdown = NOTEBOOK_LINK.sub(r"](\1.md)", markdown)
    markdown = OUTSIDE.sub(_outside, markdown)
    return PUBLIC.sub(lambda mark: "\n".join(entries(mark[1])), markdown)


def _outside(link: re.Match[str]) -> str:
    """A path in brackets after the words of a link, or alone where these are its end."""
    words, path = link.groups()
    return f"`{path}`" if path.endswith(words.strip("`")) else f"{words} (`{path}`)"


def entries(name: str) -> list[str]:
    """A line for mkdocstrings for each function and class that a module offers, by the file where it is defined."""
    module = importlib.import_module(name)
    offered = [getattr(module, attribute) for attribute in module.__all__]
    return [f"::: {value.__module__}.{value.__qualname__}" for value in offered if hasattr(value, "__qualname__")]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page for each notebook."""
    from mkdocs.structure.files import File

    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{file.stem}.md", content=notebook_page(file)))
    return files


def notebook_page(file: pathlib.Path) -> str:
    """Words, code and what it shows, as Markdown."""
    parts = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        parts += map(_shown, cell["outputs"])
    parts.append(f"This page is the notebook `docs/notebooks/{file.name}`, which the tests run.")
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return "".join(data["text/html"])
    if "image/png" in data:
        return f'<p><img alt="output" src="data:image/png;base64,{data["image/png"]}"></p>'
    return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
