"""Pictures of displacement fields: the colour wheel and arrows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from corrdit.files import written_beside
from corrdit.video import resize_frame
from corrdit.visualization.figures import figure_pixels
from corrdit.visualization.sheet import contact_sheet

_ARROW = "#ffffff"
_ARROW_EDGE = "#202428"
_MOST_ARROWS = 24
_ARROW_ROOM = 40  # pixels of a token where frames are small


def flow_colours(flow: ArrayLike, *, largest: float | None = None) -> np.ndarray:
    """A displacement field as colours: hue is the direction, saturation the length; no motion is white.

    Args:
        flow: `[..., 2]` (dx, dy), x to the right and y down.
        largest: length that has full saturation; None for the largest in `flow`. Longer ones are full too.

    Returns:
        uint8 `[..., 3]`.

    Raises:
        ValueError: not vectors, numbers that are not finite, or `largest` not above 0.
    """
    flow = np.asarray(flow, dtype=np.float64)
    if flow.shape[-1:] != (2,) or not np.isfinite(flow).all():
        raise ValueError(f"flow must be finite displacements [..., 2], got shape {flow.shape}")
    length = np.linalg.norm(flow, axis=-1)
    if largest is None:
        largest = float(length.max(initial=0)) or 1.0
    if not largest > 0:
        raise ValueError(f"largest must be a length above 0, got {largest!r}")
    saturation = np.clip(length / largest, 0, 1)
    sector = (np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi)) % 1 * 6
    # Hue to RGB at full value: each channel is a trapezium over the circle, 2 sectors apart.
    offsets = np.array([5.0, 3.0, 1.0])
    place = (offsets + sector[..., None]) % 6
    channel = 1 - saturation[..., None] * np.clip(np.minimum(place, 4 - place), 0, 1)
    return (channel * 255).round().astype(np.uint8)


def colour_wheel(size: int = 64) -> np.ndarray:
    """The key to `flow_colours`: direction from the middle, full saturation at the rim; uint8 `[size, size, 3]`."""
    if size < 2:
        raise ValueError(f"size must be at least 2 pixels, got {size!r}")
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    flow = np.stack(np.meshgrid(axis, axis), axis=-1)
    wheel = flow_colours(flow, largest=1.0)
    wheel[np.linalg.norm(flow, axis=-1) > 1] = 255
    return wheel


def draw_flow_arrows(frame: np.ndarray, flow: ArrayLike, *, scale: tuple[float, float] | None = None) -> np.ndarray:
    """Arrows over a frame, one for every token, or for some of them where there are many.

    Args:
        frame: uint8 `[H, W, 3]`.
        flow: `[h, w, 2]` (dx, dy) in tokens of the grid that covers the frame.
        scale: (dy, dx) pixels a token spans; None for (H / h, W / w).

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        ValueError: shapes that do not fit.
    """
    frame, flow = np.asarray(frame), np.asarray(flow, dtype=np.float64)
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(
            f"frame must be uint8 [H, W, 3] and flow [h, w, 2], got {frame.dtype} {frame.shape} and {flow.shape}"
        )
    from matplotlib.figure import Figure

    height, width = frame.shape[:2]
    rows, columns = flow.shape[:2]
    stride_y, stride_x = scale or (height / rows, width / columns)
    step = max(1, -(-max(rows, columns) // _MOST_ARROWS))
    y, x = np.meshgrid(np.arange(step // 2, rows, step), np.arange(step // 2, columns, step), indexing="ij")
    moved = flow[y, x]
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(frame, extent=(0, width, height, 0), aspect="auto")
    axes.quiver(
        (x + 0.5) * stride_x,
        (y + 0.5) * stride_y,
        moved[..., 0] * stride_x,
        moved[..., 1] * stride_y,
        angles="xy",
        scale_units="xy",
        scale=1,
        color=_ARROW,
        edgecolor=_ARROW_EDGE,
        linewidth=0.4,
        width=max(0.003, 1.5 / width),
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return figure_pixels(figure)


def write_flow_pictures(
    folder: str | os.PathLike[str],
    name: str,
    flow: ArrayLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    source: int = 0,
    enlarge: int = 8,
) -> list[Path]:
    """Contact sheets of the displacement from one frame to all others: colour wheel and arrows.

    Args:
        folder: an existing folder; `NAME_colours.png` and `NAME_arrows.png` are written there.
        name: of the pictures.
        flow: `[F, F, h, w, 2]` (from frame, to frame, row, column, (dx, dy)) in tokens.
        frames: uint8 `[F, H, W, 3]`, one for each frame of the flow.
        source: the frame from which the displacement is shown.
        enlarge: pixels a token has in the colour picture.

    Returns:
        The two files.

    Raises:
        ValueError: shapes that do not fit.
    """
    flow = np.asarray(flow)
    if flow.ndim != 5 or flow.shape[0] != flow.shape[1] or flow.shape[4] != 2 or len(frames) != flow.shape[0]:
        raise ValueError(
            f"flow must be [F, F, h, w, 2] with one frame for each F, got {flow.shape} and {len(frames)} frames"
        )
    targets = range(flow.shape[0])
    largest = float(np.linalg.norm(flow[source], axis=-1).max()) or 1.0
    colours = [
        flow_colours(flow[source, target], largest=largest).repeat(enlarge, axis=0).repeat(enlarge, axis=1)
        for target in targets
    ]
    shown = np.asarray(frames[source])
    height, width = shown.shape[:2]
    factor = max(1.0, _ARROW_ROOM * flow.shape[2] / height, _ARROW_ROOM * flow.shape[3] / width)
    shown = resize_frame(shown, round(height * factor), round(width * factor))
    arrows = [draw_flow_arrows(shown, flow[source, target]) for target in targets]
    labels = [f"to frame {target}" for target in targets]
    caption = f"displacement from frame {source}; full colour is {largest:.1f} tokens"
    files = [Path(folder) / f"{name}_colours.png", Path(folder) / f"{name}_arrows.png"]
    wheel = colour_wheel(min(colours[0].shape[:2]))
    padded = np.full_like(colours[0], 255)
    padded[: len(wheel), : len(wheel)] = wheel
    contact_sheet([*colours, padded], [*labels, "directions"], path=files[0], caption=caption)
    contact_sheet(arrows, labels, path=files[1], caption=caption)
    return files


def write_loss_curve(path: str | os.PathLike[str], losses: ArrayLike) -> None:
    """The losses of a motion transfer as a PNG picture.

    Args:
        path: of the file.
        losses: `[guided steps, optimisation steps]`; NaN where there is none.

    Raises:
        ValueError: another shape.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2:
        raise ValueError(f"losses must be [guided steps, optimisation steps], got shape {losses.shape}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    steps, iterations = losses.shape
    for step in range(steps):
        axes.plot(step + np.arange(iterations) / max(iterations, 1), losses[step], marker="o", markersize=3)
    axes.set_xlabel("denoising step")
    axes.set_ylabel("loss before the optimiser's step")
    axes.grid(alpha=0.3)
    with written_beside(path) as file:
        figure.savefig(file, format="png")
