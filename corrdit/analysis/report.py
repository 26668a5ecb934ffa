"""One self-contained HTML page: pictures inside, no server, no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from corrdit.files import written_beside

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 32px auto; max-width: 1180px; padding: 0 20px; color: #20262c;
  background: #fff; }
h1 { font-size: 26px; margin-bottom: 4px; } h2 { font-size: 19px; margin-top: 40px; border-top: 1px solid #e3e6ea;
  padding-top: 18px; } p { max-width: 860px; } figure { margin: 18px 0; } img { max-width: 100%; height: auto;
  display: block; } figcaption { color: #59636e; font-size: 13.5px; max-width: 860px; margin-top: 6px; }
table { border-collapse: collapse; font-size: 13.5px; margin: 12px 0; } th, td { padding: 4px 12px 4px 0;
  text-align: left; border-bottom: 1px solid #eef0f2; vertical-align: top; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; } .problem { color: #b23a1d; } .lead { font-size: 16.5px; } a { color: #2a6fbb; }
.scroll { overflow-x: auto; }"""


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

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are set to the right, None is a dash."""
        numeric = [bool(rows) and all(isinstance(row[n], (int, float, type(None))) for row in rows)
                   for n in range(len(columns))]  # fmt: skip
        head = "".join(_cell(name, "th", right) for name, right in zip(columns, numeric, strict=True))
        lines = [
            "<tr>" + "".join(_cell(value, "td", right) for value, right in zip(row, numeric, strict=True)) + "</tr>"
            for row in rows
        ]
        body = "".join(lines)
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
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
            f"<body><h1>{title}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        with written_beside(path, "w") as file:
            file.write(page)


def png_bytes(pixels: np.ndarray) -> bytes:
    """A picture, uint8 `[h, w, 3]`, as a PNG file."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def _cell(value: Any, tag: str, right: bool) -> str:
    if value is None:
        text = "–"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = html.escape(str(value))
    return f'<{tag} class="number">{text}</{tag}>' if right else f"<{tag}>{text}</{tag}>"
