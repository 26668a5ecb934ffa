"""Pages of static HTML that need no server: a report with its pictures inside, and videos side by side to compare."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from corrdit.files import written_beside
from corrdit.visualization.figures import png_bytes

_COMPARISON_STYLE = """\
body { font: 15px/1.4 system-ui, sans-serif; margin: 24px; color: #20262c; background: #fff; }
table { border-collapse: collapse; } th, td { padding: 6px 10px; text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: #fff; } video, img { max-width: 320px; min-width: 160px; display: block; }
caption { text-align: left; font-size: 20px; padding-bottom: 12px; } .prompt { max-width: 220px; }"""
_REPORT_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 32px auto; max-width: 1180px; padding: 0 20px; color: #20262c;
  background: #fff; }
h1 { font-size: 26px; margin-bottom: 4px; } h2 { font-size: 19px; margin-top: 40px; border-top: 1px solid #e3e6ea;
  padding-top: 18px; } p { max-width: 860px; } figure { margin: 18px 0; } img { max-width: 100%; height: auto;
  display: block; } figcaption { color: #59636e; font-size: 13.5px; max-width: 860px; margin-top: 6px; }
table { border-collapse: collapse; font-size: 13.5px; margin: 12px 0; } th, td { padding: 4px 12px 4px 0;
  text-align: left; border-bottom: 1px solid #eef0f2; vertical-align: top; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; } .problem { color: #b23a1d; } .lead { font-size: 16.5px; } a { color: #2a6fbb; }
.scroll { overflow-x: auto; } figure { overflow-x: auto; }
@media (max-width: 760px) { body { margin: 16px auto; padding: 0 12px; } figure img { max-width: 720px; }
  h1 { font-size: 22px; } td.number { white-space: nowrap; }
  td:last-child:not(.number) { overflow-wrap: anywhere; } }"""
_MOVING = (".mp4", ".webm", ".mov", ".mkv")
_PICTURES = (".gif", ".png", ".jpg", ".jpeg")


class ReportPage:
    """Collects sections and writes them as one file.

    Args:
        title: of the page.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")

    def text(self, words: str, *, kind: str = "") -> None:
        """A paragraph; kind "lead" is larger, "problem" stands out."""
        attribute = f' class="{kind}"' if kind else ""
        self._parts.append(f"<p{attribute}>{html.escape(words)}</p>")

    def picture(self, pixels: np.ndarray, caption: str) -> None:
        """A picture, uint8 `[h, w, 3]`, kept in the page itself."""
        encoded = base64.b64encode(png_bytes(pixels)).decode("ascii")
        text = html.escape(caption)
        self._parts.append(
            f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{encoded}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; columns of numbers, as values or text, are set to the right, with one decimal; None is a dash."""
        numeric = [bool(rows) and all(_is_number(row[n]) for row in rows) for n in range(len(columns))]
        head = "".join(_table_cell(name, "th", right) for name, right in zip(columns, numeric, strict=True))
        body = ""
        for row in rows:
            cells = (_table_cell(value, "td", right) for value, right in zip(row, numeric, strict=True))
            body += f"<tr>{''.join(cells)}</tr>"
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def links(self, words: str, files: Sequence[str]) -> None:
        """Files beside the page."""
        linked = ", ".join(f'<a href="{html.escape(file, quote=True)}">{html.escape(file)}</a>' for file in files)
        self._parts.append(f"<p>{html.escape(words)} {linked}</p>")

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page, beside and then renamed."""
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_REPORT_STYLE}</style></head>'
            f"<body><h1>{title}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        with written_beside(path, "w") as file:
            file.write(page)


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
        f"<title>{html.escape(title)}</title><style>{_COMPARISON_STYLE}</style></head><body>",
        f"<table><caption>{html.escape(title)}</caption><thead><tr><th></th>",
        *(f"<th>{html.escape(column)}</th>" for column in columns),
        "</tr></thead><tbody>",
    ]
    for text, files in rows:
        cells = [_video_cell(files[column], folder) if column in files else "<td></td>" for column in columns]
        lines.append(f'<tr><td class="prompt">{html.escape(text)}</td>{"".join(cells)}</tr>')
    lines.append("</tbody></table></body></html>\n")
    with written_beside(path, "w") as file:
        file.write("\n".join(lines))


def _video_cell(file: str | os.PathLike[str], folder: Path) -> str:
    place = Path(file).absolute()
    if not place.is_file():
        raise FileNotFoundError(f"{file} does not exist, so the page cannot show it")
    link = html.escape(quote(os.path.relpath(place, folder)))
    if place.suffix.lower() in _MOVING:
        return f'<td><video src="{link}" controls loop muted autoplay playsinline></video></td>'
    if place.suffix.lower() in _PICTURES:
        return f'<td><img src="{link}" alt=""></td>'
    raise ValueError(f"{file} is neither a video ({', '.join(_MOVING)}) nor a picture ({', '.join(_PICTURES)})")


def _table_cell(value: object, tag: str, right: bool) -> str:
    if value is None:
        text = "–"
    elif isinstance(value, float):
        text = f"{value:.1f}"
    else:
        text = html.escape(str(value))
    return f'<{tag} class="number">{text}</{tag}>' if right else f"<{tag}>{text}</{tag}>"


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (int, float)) or (isinstance(value, str) and value.isdecimal())
