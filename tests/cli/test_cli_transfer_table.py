"""`corrdit transfer TABLE`: every pair by every method of a comparison, with a table of the measures."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from corrdit.cli import main
from corrdit.integrations.diffusers.motion_transfer import results_on_disk
from corrdit.integrations.diffusers.motion_transfer.published import COMPARISONS, Variant
from corrdit.tracking import pseudo_truth
from corrdit.video import write_video

FAST = ["--steps", "2", "--guided-share", "0.5", "--num-frames", "3", "--size", "16x16"]


@pytest.fixture
def table(tmp_path):
    """Two videos with DiTFlow's prompts, of which the second ends too early; and a model."""
    from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_pipeline(build_transformer(layers=2, heads=2, head_dim=16)).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name, count in (("one", 7), ("two", 3)):
        picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        write_video(tmp_path / f"{name}.mp4", [np.roll(picture, 4 * frame, axis=1) for frame in range(count)], 8)
    ranges = {"one": "[0, 6, 2]", "two": "[0, 6, 2]"}
    rows = {name: {"easy": "a disc", "hard": "a star", "frame_range": span} for name, span in ranges.items()}
    (tmp_path / "prompts.js").write_text(f"const prompts = {rows};\n")
    return tmp_path / "prompts.js"


def test_a_comparison_is_one_command(table, tmp_path, monkeypatch, capsys):
    """One step of two methods; what cannot be done is named, and the rest is in the table beside what was published."""
    chosen = (
        Variant("backbone", {"method": "backbone"}, {2: (0.5, 0.3)}),
        Variant("ditflow", {"optimisation_steps": 1, "blocks": (1,)}, {2: (0.8, None)}),
    )
    monkeypatch.setitem(COMPARISONS, "table1", chosen)
    monkeypatch.setattr(pseudo_truth.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    command = ["transfer", str(table), "--videos", str(tmp_path), "--output", str(tmp_path / "out"), *FAST]
    command += ["--model", str(tmp_path / "model"), "--compare", "table1"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "ditflow/two-caption: the frames 0 to 6 are wanted, but" in captured.err
    assert "motion fidelity by tracks of ours" in captured.out
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["prompts"], row["pairs"], row["left out"]) for row in rows] == [
        (method, *counts)
        for method in ("backbone", "ditflow")
        for counts in (("caption", "1", "1"), ("scene", "1", "1"), ("all", "2", "2"))
    ]
    assert [row["published fidelity"] for row in rows] == ["", "", "0.5", "", "", "0.8"]
    assert [row["published quality"] for row in rows] == ["", "", "0.3", "", "", ""]
    measured = [
        json.loads((tmp_path / f"out/ditflow/one-{kind}/metrics.json").read_text()) for kind in ("caption", "scene")
    ]
    mean = np.mean([entry["motion_fidelity"] for entry in measured])
    assert float(rows[-1]["motion fidelity"]) == pytest.approx(mean)
    assert {entry["tracker"] for entry in measured} == {"ours"}
    assert json.loads((tmp_path / "out/table.json").read_text())["tracker"] == "ours"
    assert "| ditflow | all | 2 | 2 |" in (tmp_path / "out/table.md").read_text()
    # The same command again finds all of it.
    before = (tmp_path / "out/ditflow/one-scene/result.mp4").stat().st_mtime_ns
    assert main(command) == 2
    assert (tmp_path / "out/ditflow/one-scene/result.mp4").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{table}", "a prompt"], "PROMPT goes with one reference"),
        (["{table}", "--start", "1"], "--start goes with one reference"),
        (["{table}", "--max-frames", "4"], "--max-frames goes with one reference"),
        (["{table}", "--region", "[0, 0, 0.5, 1]"], "--region goes with one reference"),
        (["{table}", "--seed", "1"], "give the table a column seed"),
        (["{table}", "--format", "gif"], "--format goes with one reference"),
        (["{table}", "--stride", "2"], "the table has a step of 2; leave stride out"),
        (["{table}", "--videos", "nowhere"], "nowhere is no folder"),
        (["{table}", "--compare", "blocks", "--blocks", "1"], "--blocks is what --compare blocks varies"),
        (["{table}", "--tracker", "cotracker"], "CoTracker is not on this machine"),
        (["one.mp4"], "PROMPT is required with one reference"),
        (["one.mp4", "a prompt", "--compare", "blocks"], "--compare goes with a table of pairs"),
        (["one.mp4", "a prompt", "--videos", "x"], "--videos goes with a table of pairs"),
        (["one.mp4", "a prompt", "--processes", "2"], "--processes goes with a table of pairs"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message, table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pseudo_truth.torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    given = [argument.format(table=table.name) for argument in arguments]
    assert main(["transfer", *given, "--output", "out"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_cotracker_is_taken_where_code_and_weights_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_truth.torch.hub, "get_dir", lambda: str(tmp_path))
    assert results_on_disk.chosen_tracker("auto") == "ours"
    code = tmp_path / "facebookresearch_co-tracker_main" / "hubconf.py"
    weights = tmp_path / "checkpoints" / "scaled_offline.pth"
    for file in (code, weights):
        assert results_on_disk.chosen_tracker("auto") == "ours"
        file.parent.mkdir()
        file.touch()
    assert results_on_disk.chosen_tracker("auto") == results_on_disk.chosen_tracker("cotracker") == "cotracker"
    track, grid = results_on_disk.fidelity_tracker("cotracker", None)
    assert (track, grid) == (pseudo_truth.cotracker, 55)
    with pytest.raises(ValueError, match="tracker must be one of auto, cotracker, ours"):
        results_on_disk.chosen_tracker("raft")


def test_published_comparisons_hold_the_papers_figures():
    """Table 1 and the ablations of the paper; what an ablation varies is what its name says."""
    table = {variant.name: variant for variant in COMPARISONS["table1"]}
    assert table["ditflow"].published == {30: (0.726, 0.317), 42: (0.785, 0.319)}
    assert table["smm"].published[42] == (0.766, 0.315)
    varied = {name: {key for variant in variants for key in variant.changes} for name, variants in COMPARISONS.items()}
    assert {name: keys for name, keys in varied.items() if name != "table1"} == {
        "blocks": {"blocks"},
        "guided-share": {"guided_share"},
        "optimisation-steps": {"optimisation_steps"},
        "temperature": {"temperature"},
        "optimizer": {"optimizer"},
    }
    released = {
        variant.name: variant.published[42][0] for name in varied if name != "table1" for variant in COMPARISONS[name]
    }
    assert (
        released["blocks-20"] == released["guided-20"] == released["optimised-5"] == released["temperature-2"] == 0.797
    )
