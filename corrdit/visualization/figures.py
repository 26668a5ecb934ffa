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


def png_bytes(pixels: np.ndarray) -> bytes:
    """A picture, uint8 `[h, w, 3]`, as a PNG file."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()
