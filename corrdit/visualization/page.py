"""A page of videos side by side, for people to compare: static HTML that needs no server."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from corrdit.files import written_beside

_STYLE = """\
body { font: 15px/1.4 system-ui, sans-serif; margin: 24px; color: #20262c; background: #fff; }
table { border-collapse: collapse; } th, td { padding: 6px 10px; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #fff; } video, img { max-width: 320px; min-width: 160px; display: block; }
caption { text-align: left; font-size: 20px; padding-bottom: 12px; } .prompt { max-width: 220px; }"""
_MOVING = (".mp4", ".webm", ".mov", ".mkv")
_PICTURES = (".gif", ".png", ".jpg", ".jpeg")


def write_comparison_page(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[str, Mapping[str, str | os.PathLike[str]]]],
    *,
    title: str = "Motion transfer",
) -> None:
    """Write a table of videos: one row for each prompt, one column for each method.

    Args:
        path: of the HTML file; its folder must exist.
        rows: (text of the row, {column: video or picture file}). Files are linked relative to the page, not copied; a
            row may lack columns of others.
        title: of the page.

    Raises:
        ValueError: no rows, or a file that is neither a video nor a picture.
        FileNotFoundError: a file that does not exist.
    """
    if not rows:
        raise ValueError("there is nothing to compare: rows is empty")
    folder = Path(path).absolute().parent
    columns = list(dict.fromkeys(column for _, files in rows for column in files))
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<table><caption>{html.escape(title)}</caption><thead><tr><th></th>",
        *(f"<th>{html.escape(column)}</th>" for column in columns),
        "</tr></thead><tbody>",
    ]
    for text, files in rows:
        cells = [_cell(files[column], folder) if column in files else "<td></td>" for column in columns]
        lines.append(f'<tr><td class="prompt">{html.escape(text)}</td>{"".join(cells)}</tr>')
    lines.append("</tbody></table></body></html>\n")
    with written_beside(path, "w") as file:
        file.write("\n".join(lines))


def _cell(file: str | os.PathLike[str], folder: Path) -> str:
    place = Path(file).absolute()
    if not place.is_file():
        raise FileNotFoundError(f"{file} does not exist, so the page cannot show it")
    link = html.escape(quote(os.path.relpath(place, folder)))
    if place.suffix.lower() in _MOVING:
        return f'<td><video src="{link}" controls loop muted autoplay playsinline></video></td>'
    if place.suffix.lower() in _PICTURES:
        return f'<td><img src="{link}" alt=""></td>'
    raise ValueError(f"{file} is neither a video ({', '.join(_MOVING)}) nor a picture ({', '.join(_PICTURES)})")
