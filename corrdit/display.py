"""What notebooks show of an object: a small table, or an animation as a picture inside the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np

_MOST_FRAMES, _SIDE, _COLOURS = 8, 240, 32


def table_html(title: str, rows: Mapping[str, object]) -> str:
    """Names and values, one a line."""
    lines = "".join(
        f'<tr><td style="text-align:left">{html.escape(name)}</td>'
        f'<td style="text-align:left">{html.escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table><caption>{html.escape(title)}</caption>{lines}</table>"


def animation_html(frames: np.ndarray | Sequence[np.ndarray], fps: float, title: str) -> str:
    """At most 8 of the frames, uint8 `[H, W, 3]`, 240 pixels on the longer side, as a GIF inside the page."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int))
    pictures = []
    for index in chosen:
        picture = Image.fromarray(np.asarray(frames[index]))
        picture.thumbnail((_SIDE, _SIDE))
        pictures.append(picture.quantize(_COLOURS, method=Image.Quantize.FASTOCTREE))
    encoded = io.BytesIO()
    seconds = len(frames) / fps / len(chosen)
    pictures[0].save(
        encoded, "GIF", save_all=True, append_images=pictures[1:], duration=max(20, round(1000 * seconds)), loop=0
    )
    data = base64.b64encode(encoded.getvalue()).decode("ascii")
    words = html.escape(title, quote=True)
    return f'<figure><img alt="{words}" src="data:image/gif;base64,{data}"><figcaption>{words}</figcaption></figure>'


def outline(result: object) -> str:
    """A result in a few words: the shapes of its tensors."""
    if hasattr(result, "dtype") and hasattr(result, "shape"):
        return f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
    if isinstance(result, Mapping):
        return "; ".join(f"{name}: {outline(value)}" for name, value in result.items())
    if isinstance(result, (tuple, list)):
        return ", ".join(map(outline, result))
    return type(result).__name__
