"""Matplotlib figures as pixels, and pixels as PNG files; no pyplot, so no global state is touched."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#3a4048"


def figure_pixels(figure: Figure) -> np.ndarray:
    """A figure drawn by Agg, uint8 `[h, w, 3]`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def png_bytes(pixels: np.ndarray, colours: int | None = None) -> bytes:
    """A picture, uint8 `[h, w, 3]`, as a PNG file, with a palette of so many colours or with all of them."""
    from PIL import Image

    encoded = io.BytesIO()
    picture = Image.fromarray(pixels)
    if colours is not None:
        # By an octree, which keeps rare colours, where the median cut gives most of them to the greys.
        picture = picture.quantize(colours, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    picture.save(encoded, "PNG", optimize=colours is not None)
    return encoded.getvalue()
