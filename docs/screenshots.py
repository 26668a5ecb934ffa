"""The pictures of the documentation: tracks, and the report of an analysis and the explorer in a headless Chromium.

    python docs/screenshots.py                       # docs/figures/report.png, report-narrow.png, explore.png
    python docs/screenshots.py --output DIR [--report analysis/report.html] [--site build/site]
    python docs/screenshots.py --tracks docs/demo.png     # the first page's picture alone, without a browser

Without --report a small analysis of generated clips is made first (2 minutes on two CPU cores). With --site the first
page of the built documentation is photographed too. Needs playwright and a Chromium (Debian's package `chromium`).
"""

from __future__ import annotations

import argparse
import io
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

FIGURES = pathlib.Path(__file__).parent / "figures"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
WIDE, NARROW, HEIGHT, EXPLORER_HEIGHT = 1200, 500, 900, 640
COLOURS = 128
TRACKED_SEED, TRACKED_FRAMES = 23, (0, 3, 5, 9, 12, 19)
MINUTES_TO_START = 10


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=FIGURES, help="folder for the pictures")
    parser.add_argument("--report", type=pathlib.Path, default=None, help="report.html of an analysis")
    parser.add_argument("--site", type=pathlib.Path, default=None, help="folder of the built documentation")
    parser.add_argument("--tracks", type=pathlib.Path, default=None, help="write the picture of tracks, and no other")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    given = parser.parse_args(arguments)
    if given.tracks is not None:
        draw_tracks(given.tracks)
        return 0
    from playwright.sync_api import sync_playwright

    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=given.chromium, args=FLAGS)
        report = given.report or analysed(pathlib.Path(folder))
        for name, width in (("report", WIDE), ("report-narrow", NARROW)):
            photograph(browser, report.absolute().as_uri(), width, given.output / f"{name}.png")
        if given.site is not None:
            for name, width in (("site", WIDE), ("site-narrow", NARROW)):
                page = (given.site / "index.html").absolute().as_uri()
                photograph(browser, page, width, given.output / f"{name}.png")
        with explorer(pathlib.Path(folder)) as address:
            photograph_explorer(browser, address, given.output / "explore.png")
        browser.close()
    return 0


def draw_tracks(path: pathlib.Path) -> None:
    """Six frames of a generated clip with the points that the shipped model follows, hidden ones left out."""
    from corrdit import PointTracker, load_backbone
    from corrdit.integrations.embedded.world import demo_clip
    from corrdit.visualization import TrackStyle, contact_sheet

    video, clip = demo_clip(TRACKED_SEED)
    tracks = PointTracker(load_backbone("embedded")).track(video, "grid:14")
    drawn = tracks.draw(video, style=TrackStyle(hidden=False, fade=0.3))
    caption = f"{tracks.points} points of a grid on frame 0, followed by the embedded model; hidden ones are left out."
    chosen = [drawn[frame] for frame in TRACKED_FRAMES]
    labels = [f"frame {frame}" for frame in TRACKED_FRAMES]
    contact_sheet(chosen, labels, path=path, caption=caption, columns=3, colours=COLOURS)
    print(path, clip.prompt)


def analysed(folder: pathlib.Path) -> pathlib.Path:
    """The report of a small analysis."""
    call = ["analyze", "--world", "2", "--num-frames", "4", "--steps", "spread:4", "--output", str(folder / "analysis")]
    subprocess.run([sys.executable, "-m", "corrdit", *call], check=True)
    return folder / "analysis" / "report.html"


@contextmanager
def explorer(folder: pathlib.Path) -> Iterator[str]:
    """The address of `corrdit explore` on a generated clip, for as long as the block lasts."""
    from corrdit.integrations.embedded.world import demo_clip
    from corrdit.video import write_video

    write_video(folder / "clip.mp4", demo_clip(9)[0][:6], 8)
    call = ["explore", "clip.mp4", "--port", "0", "--prompt", "a green star turns clockwise over wood"]
    process = subprocess.Popen([sys.executable, "-m", "corrdit", *call], stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        assert process.stdout is not None
        yield next(line.split()[0] for line in process.stdout if line.startswith("http://"))
    finally:
        process.terminate()
        process.wait()


def photograph(browser: Any, address: str, width: int, path: pathlib.Path) -> None:
    """The top of a page, and a complaint where it is wider than the window."""
    page = browser.new_page(viewport={"width": width, "height": HEIGHT})
    page.goto(address)
    wide = page.evaluate("document.documentElement.scrollWidth")
    if wide > width:
        raise RuntimeError(f"{address} is {wide} pixels wide in a window of {width}")
    _keep(page.screenshot(), path)
    page.close()


def photograph_explorer(browser: Any, address: str, path: pathlib.Path) -> None:
    """The page after a click into the first frame."""
    page = browser.new_page(viewport={"width": WIDE, "height": EXPLORER_HEIGHT})
    page.goto(address, timeout=60_000 * MINUTES_TO_START)
    page.wait_for_selector('[data-testid="frame"] img')
    box = page.locator('[data-testid="frame"]').bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.35 * box["height"])
    page.wait_for_function("document.querySelector('[data-testid=\"status\"]').textContent.includes('answered')")
    page.wait_for_timeout(1000)  # pictures are sent after the words
    # How long an answer takes is a fact of the machine that takes the picture.
    page.evaluate("document.querySelector('[data-testid=\"status\"]').style.visibility = 'hidden'")
    _keep(page.screenshot(), path)
    page.close()


def _keep(picture: bytes, path: pathlib.Path) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, method=Image.Quantize.FASTOCTREE).save(
        path, optimize=True
    )
    print(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
