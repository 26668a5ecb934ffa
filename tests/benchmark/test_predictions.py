"""Predicted times of the kernels: all there, made by their script, above what a device can do, and shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from corrdit.benchmark import predictions, report
from corrdit.benchmark.comparisons import COMPARISONS
from corrdit.benchmark.floors import H200
from corrdit.benchmark.runner import pieces
from corrdit.benchmark.shapes import DEFAULT_SHAPES, SHAPES

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "predict_times.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict_times", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_piece_has_a_prediction_above_its_floor():
    for piece in pieces(list(COMPARISONS), [SHAPES[name] for name in DEFAULT_SHAPES["cuda"]]):
        found = predictions.predicted_milliseconds(
            piece.operation, piece.passes, piece.shape.name, "NVIDIA H200", "bfloat16"
        )
        assert found is not None, piece
        assert found >= 0.95 * piece.floor(H200, torch.bfloat16).milliseconds, piece


@pytest.mark.parametrize(("device", "dtype"), [("NVIDIA A100", "bfloat16"), ("NVIDIA H200", "float32")])
def test_nothing_is_predicted_of_other_devices(device, dtype):
    asked = ("soft_displacement:logits", "forward", "cogvideox-5b", device, dtype)
    assert predictions.predicted_milliseconds(*asked) is None


def test_the_committed_predictions_are_those_of_their_script(tmp_path):
    path = tmp_path / "predicted.json"
    assert script().main(path) == 0
    assert path.read_text(encoding="utf-8") == predictions.FILE.read_text(encoding="utf-8")


def test_a_prediction_and_a_replay_stand_beside_the_measured_time():
    row = {"milliseconds": {"median": 3.21}, "predicted_milliseconds": 2.86, "replay_milliseconds": 3.1}
    assert report._own_time(row) == "3.21 ms (predicted 2.86 ms, replayed 3.1 ms)"
    assert report._own_time({**row, "predicted_milliseconds": None}) == "3.21 ms (replayed 3.1 ms)"
    failed = {"milliseconds": {"median": 3.21}, "replay_left_out": "RuntimeError: operation not permitted"}
    assert report._own_time(failed) == "3.21 ms (replayed failed)"
