"""`Trainer.test` on a TrackingModule: the figures EvaluationModule writes, logged, and nothing written."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from lightning.pytorch.demos.boring_classes import BoringDataModule

from corrdit.data import TapVidVideo, write_tapvid
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.lightning import EvaluationModule, TapVidDataModule, TrackingModule
from corrdit.metrics.tapvid import METRIC_NAMES

PROCESS = pathlib.Path(__file__).with_name("tracking_test_process.py")
OPTIONS = {"backend": "reference", "height": 32, "width": 48, "layer": 0}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no text encoder"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("cogvideox-rotary")


def figures_of(trainer, backbone, output, data, **options) -> dict[str, float]:
    (logged,) = trainer.test(TrackingModule(backbone, output=output, options=OPTIONS, **options), data, verbose=False)
    return logged


@pytest.mark.parametrize("data", [{}, {"mode": "strided", "stride": 2}, {"mode": "frame_0", "max_frames": 4}])
def test_the_figures_are_those_of_an_evaluation(davis, backbone, trainer, tmp_path, data):
    logged = figures_of(trainer, backbone, tmp_path / "tested", TapVidDataModule(davis, **data))
    module = EvaluationModule(backbone, output=tmp_path / "evaluated", tracker_options=OPTIONS)
    trainer.predict(module, TapVidDataModule(davis, **data))
    (row,) = json.loads((tmp_path / "evaluated" / "table.json").read_text())["trackers"]
    for name in METRIC_NAMES:
        assert logged[name] == pytest.approx(row[name], abs=1e-6), name
    assert (logged["videos"], logged["videos_without_visible_points"], logged["broken_videos"]) == (4, 1, 0)
    assert not (tmp_path / "tested").exists()


def test_presets_of_the_tracker_and_the_model_count(davis, backbone, trainer, tmp_path):
    data = TapVidDataModule(davis, end=2)
    found = [figures_of(trainer, backbone, tmp_path, data, preset=preset) for preset in ("default", "published")]
    assert found[0]["average_jaccard"] != found[1]["average_jaccard"]


def test_broken_videos_are_counted_and_not_averaged(videos, backbone, trainer, tmp_path):
    path = tmp_path / "set.pkl"
    write_tapvid(path, videos[:2])
    whole = figures_of(trainer, backbone, tmp_path, TapVidDataModule(path))
    short = TapVidVideo("short", np.zeros((1, 24, 32, 3), np.uint8), np.full((3, 1, 2), 0.5), np.zeros((3, 1), bool))
    write_tapvid(path, [*videos[:2], short])
    with pytest.warns(UserWarning, match="video short is not in the means: "):
        found = figures_of(trainer, backbone, tmp_path, TapVidDataModule(path))
    assert (found["videos"], found["broken_videos"]) == (2, 1)
    assert {name: found[name] for name in METRIC_NAMES} == {name: whole[name] for name in METRIC_NAMES}
    with pytest.raises(ValueError, match="video short: "):
        figures_of(trainer, backbone, tmp_path, TapVidDataModule(path), on_broken="raise")


def test_data_without_truth_are_refused(backbone, trainer, tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="is tested on a TapVidDataModule; give the Trainer one"):
        figures_of(trainer, backbone, tmp_path, BoringDataModule())


@pytest.mark.slow
def test_three_processes_log_what_one_logs(davis, backbone, trainer, tmp_path):
    """Five videos on three processes, one of them without a visible point."""
    expected = figures_of(trainer, backbone, tmp_path, TapVidDataModule(davis))
    output = tmp_path / "logged.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "LOCAL_RANK"))}
    subprocess.run(
        [sys.executable, str(PROCESS), str(davis), str(output), "3"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert json.loads(output.read_text()) == pytest.approx(expected, abs=1e-7)
