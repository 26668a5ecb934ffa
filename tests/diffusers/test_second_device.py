"""Models that are not on the CPU: their tasks do there what they do on it, on a device that stands in for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corrdit.integrations.diffusers.transfer_settings import METHODS
from corrdit.testing import TINY_MODELS

PROCESS = Path(__file__).with_name("second_device.py")
TRANSFERS = [*(method for method in METHODS if method != "path"), "embedding"]
READING = ["capture", "guidance", "tracking"]
FAMILIES = [
    name for name in ("hunyuanvideo", "ltx", "mochi", "allegro", "kandinsky5", "skyreelsv2") if name in TINY_MODELS
]


def wrong(*cases: str) -> dict[str, str]:
    """What was wrong with some cases."""
    run = subprocess.run(
        [sys.executable, str(PROCESS), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, str] = json.loads(run.stdout.strip().splitlines()[-1])
    assert sorted(found) == sorted(cases)
    return {case: text for case, text in found.items() if text}


def test_tasks_run_where_the_model_is():
    # Adding noise leaves a table of the scheduler on the device, which FlowMotion reads.
    reading = ("capture:wan", "guidance:wan", "tracking:embedded", "explore:embedded")
    assert wrong(*reading, "ditflow:cogvideox", "flowmotion:cogvideox") == {}


def test_the_device_is_not_the_cpu():
    """A planted mistake is found."""
    found = wrong("planted:wan")
    assert "of tensors on two devices" in found["planted:wan"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_every_method_of_transfer_runs_where_the_model_is(name):
    assert wrong(*(f"{method}:{name}" for method in TRANSFERS)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_where_it_is(name):
    assert wrong(*(f"{task}:{name}" for task in READING)) == {}
