"""The page of `corrdit explore`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nicegui import app, events, run, ui
from PIL import Image

from corrdit.files import written_beside
from corrdit.integrations.diffusers.analysis import Exploration, PointAnswer, Setting
from corrdit.video import resize_frame
from corrdit.visualization.attention_maps import draw_attention_maps
from corrdit.visualization.sheet import contact_sheet

if TYPE_CHECKING:
    from nicegui.elements.interactive_image import InteractiveImage

CELL = 190
"""Width in pixels of one frame's map."""
COLUMNS = 3
_GAP = 4
PATHS = ("#00e5ff", "#ff9100")
"""Colours of the matches of A and of B over the frame."""
_PATH = '<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-opacity="0.8"/>'
_RING = '<circle cx="{x}" cy="{y}" r="7" fill="none" stroke="white" stroke-width="3"/>'


def serve(exploration: Exploration, call: Mapping[str, Any], *, output: str, host: str, port: int) -> None:
    """Show the page until the process is stopped, and print its address when it is about to answer.

    Args:
        exploration: of `explore`.
        call: the video, the model and the arguments it was made with, for the calls that are saved.
        output: folder for what is saved.
        host, port: where the page is.
    """
    app.on_startup(lambda: print(f"http://{host}:{port}  (Ctrl-C ends)", flush=True))
    app.on_exception(lambda error: ui.notify(str(error), type="negative"))
    ui.run(
        lambda: ExplorerPage(exploration, call, Path(output)).build(),
        host=host,
        port=port,
        title="corrdit explore",
        show=False,
        reload=False,
        dark=None,
        show_welcome_message=False,
        uvicorn_logging_level="warning",
    )


class ExplorerPage:
    """What one browser tab shows: a frame to click on, and two settings.

    Args:
        exploration: that answers.
        call: as for `serve`.
        output: folder for what is saved.
    """

    def __init__(self, exploration: Exploration, call: Mapping[str, Any], output: Path) -> None:
        self.exploration, self.call, self.output = exploration, call, output
        self.frame = 0
        self.point: tuple[float, float] | None = None
        middle, step = exploration.layers[len(exploration.layers) // 2], exploration.steps[-1]
        preferred = exploration.preferred_layer
        self.panels = [Panel(self, Setting(preferred, step)), Panel(self, Setting(middle, step, 0))]
        self.picture: InteractiveImage | None = None

    def build(self) -> None:
        """Lay the page out."""
        count = len(self.exploration.frames)
        ui.label(f"{self.call['video']}, read by {self.call['model']}").classes("text-lg")
        ui.label(
            "Click a point of the frame. Its cost map is shown over every frame, with its best match (cross; as a path"
            " over the frame, A blue, B orange), and its attention to frames and words. Each map is scaled by itself."
        )
        with ui.row().classes("w-full items-start no-wrap max-md:flex-wrap gap-6"):
            with ui.column().classes("w-full max-w-xl"):
                self.picture = ui.interactive_image(
                    Image.fromarray(self.exploration.frames[0]), events=["click"], cross=True, on_mouse=self.clicked
                ).classes("w-full")
                self.picture.props('data-testid="frame"')
                slider = ui.slider(min=0, max=count - 1, value=0, step=1, on_change=lambda e: self.show(int(e.value)))
                slider.props('label switch-label-side data-testid="frame-slider"')
                ui.label().bind_text_from(self, "frame", lambda frame: f"frame {frame} of {count} that were read")
                with ui.row():
                    ui.button("Save", on_click=self.save).props('data-testid="save"')
                    self.status = ui.label().props('data-testid="status"')
            for name, panel in zip("AB", self.panels, strict=True):
                with ui.column().classes("w-full max-w-2xl"):
                    panel.build(name)

    async def clicked(self, event: events.MouseEventArguments) -> None:
        """A click on the frame, in pixels of the video."""
        height, width = self.exploration.frames.shape[1:3]
        self.point = (min(max(event.image_x, 0.0), width), min(max(event.image_y, 0.0), height))
        await self.answer()

    async def show(self, frame: int) -> None:
        """Another frame; the point stays where it is."""
        self.frame = frame
        assert self.picture is not None
        self.picture.set_source(Image.fromarray(self.exploration.frames[frame]))
        await self.answer()

    async def answer(self) -> None:
        """Ask both settings about the point."""
        if self.point is None or self.picture is None:
            return
        began = time.perf_counter()
        ring = _RING.format(x=self.point[0], y=self.point[1])
        paths = [
            _PATH.format(points=await panel.answer(), colour=colour)
            for panel, colour in zip(self.panels, PATHS, strict=True)
        ]
        self.picture.content = "".join(paths) + ring
        self.status.text = f"answered in {time.perf_counter() - began:.2f} s"

    async def save(self) -> None:
        """Write what is shown, and the call that gives it."""
        if self.point is None:
            ui.notify("Click a point first.")
            return
        self.output.mkdir(parents=True, exist_ok=True)
        name = next(
            name
            for name in (f"point_{number:03}" for number in itertools.count())
            if not (self.output / f"{name}.png").exists()
        )
        await run.io_bound(self._write, self.output / name)
        self.status.text = f"saved {self.output / name}.png and .py"

    def _write(self, path: Path) -> None:
        assert self.point is not None
        cells: list[np.ndarray] = []
        labels: list[str] = []
        for name, panel in zip("AB", self.panels, strict=True):
            assert panel.shown is not None
            cells += panel.shown
            labels += [f"{name}, frame {index}" for index in range(len(panel.shown))]
        x, y = self.point
        which = "; ".join(f"{name}: {_words_of(panel.setting)}" for name, panel in zip("AB", self.panels, strict=True))
        caption = f"The point ({x:.1f}, {y:.1f}) of frame {self.frame}. {which}. Each map is scaled by itself."
        contact_sheet(cells, labels, path=f"{path}.png", caption=caption, columns=len(self.exploration.frames))
        with written_beside(f"{path}.py") as file:
            file.write(call_of(self.call, self.frame, self.point, [panel.setting for panel in self.panels]).encode())


class Panel:
    """One setting and what it says.

    Args:
        page: it is on.
        setting: to begin with.
    """

    def __init__(self, page: ExplorerPage, setting: Setting) -> None:
        self.page, self.setting = page, setting
        self.shown: list[np.ndarray] | None = None

    def build(self, name: str) -> None:
        """Lay it out."""
        exploration = self.page.exploration
        heads = {-1: "mean of heads", **{head: f"head {head}" for head in range(exploration.heads)}}
        layers = {layer: f"layer {layer}" for layer in exploration.layers}
        steps = {step: f"step {step}" for step in exploration.steps}
        head = -1 if self.setting.head is None else self.setting.head
        with ui.row().classes("items-center"):
            ui.label(name).classes("text-lg")
            for field, options, value in (
                ("layer", layers, self.setting.layer),
                ("step", steps, self.setting.step),
                ("head", heads, head),
            ):
                choose = ui.select(options, value=value, on_change=lambda e, field=field: self.changed(field, e.value))
                choose.props(f'dense data-testid="{field}-{name}"')
        self.image = ui.image().classes("w-full")
        self.image.props(f'data-testid="maps-{name}"')
        self.text = ui.label().classes("text-sm").props(f'data-testid="text-{name}"')
        self.table = ui.table(
            columns=[
                {"name": key, "label": label, "field": key, "align": "right"}
                for key, label in (
                    ("frame", "frame"),
                    ("cost", "largest cost"),
                    ("place", "at x, y"),
                    ("mass", "attention"),
                )
            ],
            rows=[],
        )
        self.table.props(f'dense flat data-testid="table-{name}"').classes("w-full")

    async def changed(self, field: str, value: int) -> None:
        """Another layer, step or head."""
        changes: dict[str, Any] = {field: None if field == "head" and value < 0 else value}
        self.setting = self.setting._replace(**changes)
        await self.page.answer()

    async def answer(self) -> str:
        """Ask about the page's point and show it; gives the path of its matches, as SVG has it."""
        assert self.page.point is not None
        found = await run.io_bound(self.page.exploration.ask, self.page.frame, *self.page.point, self.setting)
        self.shown = drawn_maps(self.page.exploration, found, self.page.frame, self.page.point)
        self.image.set_source(Image.fromarray(tiled(self.shown, COLUMNS)))
        words = zip(self.page.exploration.words, found.words.tolist(), strict=False)
        shares = ", ".join(f"{word} {100 * share:.2f} %" for word, share in words)
        self.text.text = f"attention on words: {shares}" if shares else ""
        self.table.rows = [
            {
                "frame": index,
                "cost": f"{float(costs.max()):.4f}",
                "place": f"{x:.1f}, {y:.1f}",
                "mass": f"{100 * float(found.frames[index]):.1f} %",
            }
            for index, (costs, (x, y)) in enumerate(zip(found.costs, found.xy.tolist(), strict=True))
        ]
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in found.xy.tolist())


def drawn_maps(
    exploration: Exploration, found: PointAnswer, frame: int, point: tuple[float, float]
) -> list[np.ndarray]:
    """The cost map over every frame: a ring where the point is, a cross where it is matched."""
    height, width = exploration.frames.shape[1:3]
    size = (max(1, round(CELL * height / width)), CELL)
    small = np.stack([resize_frame(picture, *size) for picture in exploration.frames])
    scale = np.array(size[::-1]) / (width, height)
    # The frame that is asked comes first, as it is the one with a ring.
    order = [frame, *(index for index in range(len(small)) if index != frame)]
    drawn = draw_attention_maps(
        small[order],
        found.costs.numpy()[order],
        size=size,
        query=np.array(point) * scale,
        truth=found.xy[order] * scale,
        gain=0.5,
    )
    return [picture for _, picture in sorted(zip(order, drawn, strict=True), key=lambda pair: pair[0])]


def tiled(pictures: list[np.ndarray], columns: int) -> np.ndarray:
    """Pictures of one size in rows, with white between them."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def call_of(call: Mapping[str, Any], frame: int, point: tuple[float, float], settings: list[Setting]) -> str:
    """Python that gives the same answers."""
    reading = {name: call[name] for name in ("start", "max_frames") if call[name]}
    asked = {name: call[name] for name in ("layers", "steps", "prompt") if call[name]}
    given = "".join(f", {name}={value!r}" for name, value in reading.items())
    wanted = "".join(f", {name}={value!r}" for name, value in asked.items())
    chosen = ", ".join(f"Setting({layer}, {step}, {head})" for layer, step, head in settings)
    return f"""from corrdit import load_backbone
from corrdit.integrations.diffusers.analysis import Setting, explore
from corrdit.video import StreamedVideo

video = StreamedVideo({call["video"]!r}, max_side=720{given})
exploration = explore(load_backbone({call["model"]!r}), video{wanted})
for setting in ({chosen},):
    answer = exploration.ask({frame}, {point[0]!r}, {point[1]!r}, setting)
    print(setting, answer.costs.amax((1, 2)), answer.xy, answer.words, answer.frames)
"""


def _words_of(setting: Setting) -> str:
    head = "mean" if setting.head is None else f"head {setting.head}"
    return f"layer {setting.layer}, step {setting.step}, {head}"
