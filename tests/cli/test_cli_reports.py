"""`corrdit demo`, `corrdit models`, `corrdit doctor`: what they print."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corrdit.cli import demo, doctor, main
from corrdit.tracking import Tracks
from corrdit.video import read_video


@pytest.mark.usefixtures("drifting_tracker")
def test_demo_compares_with_the_exact_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from corrdit.integrations.embedded.world import demo_clip

    assert main(["demo", "--output", str(tmp_path / "demo"), "--points", "5", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert written == ["clip.mp4", "tracks.mp4", "tracks.npz", "tracks.png", "truth.npz"]
    video, clip = demo_clip(4)
    truth = Tracks.load(tmp_path / "demo" / "truth.npz")
    with np.load(tmp_path / "demo" / "tracks.npz") as archive:
        queries = archive["queries"]
    np.testing.assert_array_equal(truth.xy, clip.tracks(queries).xy)
    assert np.abs(read_video(tmp_path / "demo" / "clip.mp4").frames.astype(int) - video).mean() < 6
    moved = np.linalg.norm(truth.xy - queries[None, :, 1:], axis=-1) > 8
    chosen = moved & np.asarray(truth.visible)
    assert f"Visible points that moved by more than 8 px ({chosen.sum()} positions)" in out
    still = np.linalg.norm(truth.xy - queries[None, :, 1:], axis=-1)[chosen]
    moving_table = out.split("All visible points")[0]
    row = next(line for line in moving_table.splitlines() if line.strip().startswith("standing still"))
    assert row.split()[2:6] == [f"{np.median(still):.1f}", "px", f"{still.mean():.1f}", "px"]
    assert row.split()[6:] == ["0", "%"] * 3, "points that stand still are never right where points moved"
    for name in ("corrdit, embedded", "nearest patch of 7 x 7"):
        assert moving_table.count(name) == 1


def test_demo_errors_are_distances() -> None:
    truth = Tracks(xy=np.zeros((2, 2, 2)), visible=np.ones((2, 2), bool), score=np.ones((2, 2)))
    guess = Tracks(xy=np.array([[[3, 4], [0, 1]], [[6, 8], [0, 0]]]), visible=truth.visible, score=truth.score)
    everywhere = np.ones((2, 2), bool)
    plain_truth: Any = type("Truth", (), {"xy": truth.xy.numpy()})
    assert demo.error_cells(guess, plain_truth, everywhere) == ("3.0 px", "4.0 px", "50 %", "50 %", "75 %")
    assert demo.error_cells(guess, plain_truth, ~everywhere) == ("none",) * 5


def test_demo_refuses(refused: Any, tmp_path: Path) -> None:
    assert "--points 0" in refused("demo", "--output", tmp_path / "out", "--points", "0")
    assert list(tmp_path.iterdir()) == []


def test_models_lists_what_load_backbone_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    families = {row["transformers"][0]: row for row in rows if "transformers" in row}
    assert families["WanTransformer3DModel"]["uses"]["transfer"] == {"supported": "yes", "reason": ""}
    assert families["LatteTransformer3DModel"]["uses"]["tracking"]["supported"] == "no"
    points = {row["checkpoint"]: row for row in rows if "checkpoint" in row}
    assert points["wan-2.2-ti2v-5b"]["hub_id"] == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    assert "convert_wan_to_diffusers" in points["wan-2.2-ti2v-5b"]["parts"]["transformer"]["source"]
    assert {"hub_id": "Motif-Technologies/Motif-Video-2B", "unknown": "layers and heads"} in rows
    assert (points["wan-2.2-ti2v-5b"]["family"], points["wan-2.2-ti2v-5b"]["uses"]["tracking"]["supported"]) == (
        "wan",
        "yes",
    )
    rows = [row for row in rows if "name" in row]
    by_name = {row["name"]: row for row in rows}
    assert by_name["cogvideox-2b"]["layers"] == 30
    assert by_name["cogvideox-2b"]["preset"]["layer"] == 17
    assert "embedded" in by_name
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers" in table
    assert "nvidia/Cosmos3-Nano: no public file states its layers and heads" in table
    reason = families["CosmosTransformer3DModel"]["uses"]["transfer"]["reason"]
    number = next(line for line in table.splitlines() if line.endswith(reason)).partition(" ")[0]
    assert f"partly {number}" in next(line for line in table.splitlines() if "CosmosTransformer3DModel" in line)
    assert all(point["hub_id"] in table for point in points.values())
    for row in rows:
        line = next(line for line in table.splitlines() if line.strip().startswith(row["name"] + " "))
        assert row["source"] in line
        if row["preset"]:
            assert f"layer {row['preset']['layer']}, step" in line


def test_doctor_tells_versions_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"]["version"] == importlib.metadata.version("torch")
    assert report["versions"]["lightning"]["accepted"].count("!=") == 2
    assert "threads" in report["devices"]["cpu"]
    assert report["backends"]["streaming"] is None
    assert report["backends"]["reference"] is None
    if not torch.cuda.is_available():
        assert report["backends"]["triton"]
        assert report["attention"]["flash (CUDA)"]
        assert report["devices"]["cuda"].startswith("none: ")
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    for title in ("Versions", "Devices", "Backends of corrdit.ops", "Models and videos"):
        assert title in table


def test_doctor_never_needs_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("triton", "diffusers", "av")
    find_spec, version = importlib.util.find_spec, importlib.metadata.version

    def without_spec(name: str, *arguments: Any) -> Any:
        return None if name in missing else find_spec(name, *arguments)

    def without_version(name: str) -> str:
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.util, "find_spec", without_spec)
    monkeypatch.setattr(importlib.metadata, "version", without_version)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert doctor.backends()["triton"] == "triton is not installed"
    assert doctor.files()["embedded model"] == "needs diffusers, which is not installed"
    assert doctor.files()["mp4 (H.264)"] == "needs PyAV, which is not installed"
    assert main(["doctor"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["diffusers", "not", "installed"] in [line[:3] for line in lines]
