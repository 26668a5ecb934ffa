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
from corrdit.visualization.sheet import contact_sheet, sheet_frames

_ARROW_EDGE = "#202428"
_MOST_ARROWS = 10
_ARROW_ROOM = 36  # pixels of a cell
_THICKNESS = 0.12
"""Of an arrow's shaft, as a share of its cell."""
_LONGEST = 2.0
"""Cells that the longest arrow spans at most."""
_STILL = 0.5
_FULL_SHARE = 0.9
"""Of the vectors that move, so that a single wrong match does not make all others pale."""
_MOST_PICTURES = 8
_FADED = 0.45
_PALETTE = 256
"""Colours of a sheet of arrows, which makes its file a third as large."""


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


def draw_flow_arrows(
    frame: np.ndarray, flow: ArrayLike, *, largest: float | None = None, shrink: float = 1.0
) -> np.ndarray:
    """A few thick arrows over a frame, in the colours of `flow_colours`, one for each cell of tokens.

    Args:
        frame: uint8 `[H, W, 3]`.
        flow: `[h, w, 2]` (dx, dy) in tokens of the grid that covers the frame. An arrow is the median of its cell;
            there is none where that moves by less than half a token.
        largest: length in tokens that has full colour; None for the largest in `flow`.
        shrink: arrows are drawn at this share of their length.

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
    side = _cell(rows, columns)
    corners = [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]
    cells = [flow[top : top + side, left : left + side] for top, left in corners]
    moved = np.array([np.median(cell.reshape(-1, 2), axis=0) for cell in cells])
    middle = np.array(corners) + np.array([cell.shape[:2] for cell in cells]) / 2
    shown = np.linalg.norm(moved, axis=1) >= _STILL
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(frame, extent=(0, width, height, 0), aspect="auto")
    if shown.any():
        stride = np.array([width / columns, height / rows])
        start, step = middle[shown, ::-1] * stride, moved[shown] * stride * shrink
        colours = flow_colours(moved[shown], largest=largest) / 255
        thickness = max(2.0, _THICKNESS * side * float(stride.min()))
        options = {"angles": "xy", "scale_units": "xy", "scale": 1, "units": "dots", "minlength": 0.1}
        options |= {"headwidth": 2.8, "headlength": 2.6, "headaxislength": 2.4}
        axes.quiver(
            *start.T, *step.T, color=colours, edgecolor=_ARROW_EDGE, linewidth=1.0, width=thickness, **options
        )  # fmt: skip
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    return figure_pixels(figure)


def full_colour_at(flow: ArrayLike) -> float:
    """Length in tokens that shows a field `[..., 2]` best in full colour: few vectors that move are longer."""
    lengths = np.linalg.norm(np.asarray(flow, dtype=np.float64), axis=-1)
    moving = lengths[lengths > 0]
    return max(1.0, float(np.quantile(moving, _FULL_SHARE))) if moving.size else 1.0


def _cell(rows: int, columns: int) -> int:
    """Tokens a side of the cells that have an arrow each."""
    return max(1, -(-max(rows, columns) // _MOST_ARROWS))


def write_flow_pictures(
    folder: str | os.PathLike[str],
    name: str,
    flow: ArrayLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    source: int = 0,
    enlarge: int = 8,
) -> list[Path]:
    """Contact sheets of the displacement from one frame to others: colour wheel and arrows.

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
    largest = full_colour_at(flow[source])
    caption = f"displacement from frame {source}; full colour from {largest:.1f} tokens on"
    files = [Path(folder) / f"{name}_colours.png", Path(folder) / f"{name}_arrows.png"]
    colours = [
        flow_colours(field, largest=largest).repeat(enlarge, axis=0).repeat(enlarge, axis=1) for field in flow[source]
    ]
    labels = [f"to frame {target}" for target in range(flow.shape[0])]
    contact_sheet([*colours, _key(*colours[0].shape[:2])], [*labels, "directions"], path=files[0], caption=caption)
    _write_arrows(files[1], flow[source], np.asarray(frames[source]), source, largest, caption)
    return files


def _write_arrows(file: Path, flow: np.ndarray, frame: np.ndarray, source: int, largest: float, caption: str) -> None:
    """The displacement `[F, h, w, 2]` from a frame to some others as arrows on that frame."""
    targets = [target for target in sheet_frames(len(flow), _MOST_PICTURES + 1) if target != source] or [source]
    height, width = _arrow_size(frame.shape[:2], flow.shape[1:3])
    shrink = min(1.0, _LONGEST * _cell(*flow.shape[1:3]) / largest)
    paper = _faded(resize_frame(frame, height, width))
    shown = [draw_flow_arrows(paper, flow[target], largest=largest, shrink=shrink) for target in targets]
    scale = "" if shrink == 1 else f"; arrows at {shrink:.2f} of their length"
    contact_sheet(
        [*shown, _key(height, width)],
        [*(f"to frame {target}" for target in targets), "directions"],
        path=file,
        caption=caption + scale,
        columns=min(3, len(shown) + 1),
        colours=_PALETTE,
    )


def _arrow_size(frame: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a picture whose cells have room for an arrow."""
    height, width = frame
    factor = _ARROW_ROOM / _cell(*grid) * max(grid) / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def _faded(frame: np.ndarray) -> np.ndarray:
    """A frame as a light grey picture, on which colours can be told."""
    grey = frame.mean(-1, keepdims=True)
    return (255 - _FADED * (255 - grey)).round().astype(np.uint8).repeat(3, axis=-1)


def _key(height: int, width: int) -> np.ndarray:
    """The colour wheel in the middle of a white picture."""
    wheel = colour_wheel(max(2, min(height, width)))
    picture = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - len(wheel)) // 2, (width - len(wheel)) // 2
    picture[max(top, 0) : max(top, 0) + len(wheel), max(left, 0) : max(left, 0) + len(wheel)] = wheel[:height, :width]
    return picture


def write_loss_curve(path: str | os.PathLike[str], losses: ArrayLike, *, first_step: int = 0) -> None:
    """The losses of a motion transfer as a PNG picture.

    Args:
        path: of the file.
        losses: `[guided steps, optimisation steps]`; NaN where there is none.
        first_step: the denoising step of the first row.

    Raises:
        ValueError: another shape.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 2:
        raise ValueError(f"losses must be [guided steps, optimisation steps], got shape {losses.shape}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    steps, iterations = losses.shape
    known = np.isfinite(losses)
    begin, end = (
        [losses[step, known[step]][at] if known[step].any() else np.nan for step in range(steps)] for at in (0, -1)
    )
    numbers = first_step + np.arange(steps)
    for step in range(steps):
        places = numbers[step] + 0.8 * np.arange(iterations) / max(iterations - 1, 1) - 0.4 * (iterations > 1)
        label = "steps of the optimiser" if step == 0 else None
        axes.plot(places[known[step]], losses[step, known[step]], color="#9aa3ad", linewidth=1.2, label=label)
    axes.plot(numbers, begin, "o", color="#e4572e", markersize=5, label="before the first")
    axes.plot(numbers, end, "o", color="#2a6fbb", markersize=5, label="before the last")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6) if steps else None
    axes.set_xlabel("denoising step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0, top=1.1 * np.nanmax(losses) if known.any() and np.nanmax(losses) > 0 else None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    with written_beside(path) as file:
        figure.savefig(file, format="png")
