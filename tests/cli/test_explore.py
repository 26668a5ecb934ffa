"""The page of `corrdit explore`: what it draws, the call it saves, and clicks in a browser where there is one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from corrdit.cli import main
from corrdit.cli.explore import free_port
from corrdit.integrations.embedded.world import demo_clip
from corrdit.video import write_video

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("explore") / "clip.mp4"
    write_video(path, demo_clip(0)[0][:4, :64, :96], 8)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.mp4"], "missing.mp4"),
        (["clip.mp4", "--port", "70000"], "--port 70000 is no port; accepted are 1 to 65535, or 0 for a free one"),
    ],
)
def test_bad_input(words, message, monkeypatch, capsys):
    monkeypatch.setattr("corrdit.cli.explore.importlib.util.find_spec", lambda name: object())
    assert main(["explore", *words]) == 2
    assert message in capsys.readouterr().err


def test_without_the_page_package(monkeypatch, capsys):
    monkeypatch.setattr("corrdit.cli.explore.importlib.util.find_spec", lambda name: None)
    assert main(["explore", "clip.mp4"]) == 2
    assert 'pip install ".[explore]"' in capsys.readouterr().err


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port} cannot be used"):
            free_port(port)
    assert free_port(0) > 0


def test_the_saved_call_gives_what_is_shown(video, capsys):
    pytest.importorskip("nicegui")
    from corrdit.cli.explore_page import call_of, drawn_maps, tiled
    from corrdit.integrations.diffusers.analysis import Setting

    call = {"video": str(video), "model": "embedded", "start": 0, "max_frames": 3, "layers": [4], "steps": None}
    code = call_of({**call, "prompt": "a red disc"}, 1, (20.5, 30.25), [Setting(4, 49), Setting(4, 49, 2)])
    names: dict = {}
    exec(code, names)
    printed = capsys.readouterr().out
    assert printed.count("Setting(layer=4") == 2
    found = names["exploration"].ask(1, 20.5, 30.25, Setting(4, 49))
    pictures = drawn_maps(names["exploration"], found, 1, (20.5, 30.25))
    assert len(pictures) == 3
    assert tiled(pictures, 2).shape[0] == 2 * pictures[0].shape[0] + 4
    ring = np.abs(pictures[1].astype(int) - 255).sum(-1).min()
    assert ring == 0, "the asked frame, and no other, has the white ring"
    assert np.abs(pictures[0].astype(int) - 255).sum(-1).min() > 0


@pytest.fixture
def page(video, tmp_path):
    """A running page and the folder it saves in."""
    pytest.importorskip("nicegui")
    port = free_port(0)
    words = ["explore", str(video), "--port", str(port), "--output", str(tmp_path / "saved"), "--prompt", "a red disc"]
    # A shell in the background starts its children with Ctrl-C ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from corrdit.cli import entry_point; entry_point()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # NiceGUI starts no server where it sees pytest at work.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("http://"):
            break
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    try:
        yield f"http://127.0.0.1:{port}/", tmp_path / "saved", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_page_is_there_and_ends_with_ctrl_c(page):
    address, _, process = page
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    assert "corrdit explore" in text
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium at /usr/bin/chromium")
def test_a_click_shows_the_cost_map(page):
    """The figure shown is that of `ops.cost_rows`, which the saved call prints."""
    browser_of = pytest.importorskip("playwright.sync_api").sync_playwright
    address, saved, _ = page
    with browser_of() as browsers:
        browser = browsers.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.goto(address)
        frame = tab.locator('[data-testid="frame"]')
        tab.wait_for_selector('[data-testid="frame"] img')
        box = frame.bounding_box()
        tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        told = "document.querySelector('[data-testid=\"status\"]').textContent.includes('{}')"
        tab.wait_for_function(told.format("answered"))
        before = tab.text_content('[data-testid="table-A"]')
        tab.locator('[data-testid="layer-A"]').click()
        tab.get_by_role("option", name="layer 1").click()
        tab.wait_for_function(f"document.querySelector('[data-testid=\"table-A\"]').textContent != {before!r}")
        assert "red" in tab.text_content('[data-testid="text-A"]')
        tab.click('[data-testid="save"]')
        tab.wait_for_function(told.format("saved"))
        cells = tab.locator('[data-testid="table-A"] tbody tr').first.locator("td").all_text_contents()
        browser.close()
    assert sorted(path.name for path in saved.iterdir()) == ["point_000.png", "point_000.py"]
    done = subprocess.run([sys.executable, saved / "point_000.py"], capture_output=True, text=True, check=True)
    largest = re.search(r"tensor\(\[([\d.e-]+)", done.stdout)
    assert largest is not None
    assert float(largest[1]) == pytest.approx(float(cells[1]), rel=2e-3)
