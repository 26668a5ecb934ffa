"""The benchmark of the tracker: rows that the tracker accepts, runs that go on where they were stopped."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import types

import pytest

from corrdit import load_backbone
from corrdit.tracking.options import PRESETS, changed_options

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tracking(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("tracking")


def test_all_rows_are_options_of_their_tracker(tracking):
    backbone = load_backbone("embedded")
    for variant in tracking.variants(backbone):
        if variant.kind == "tracker":
            options = dict(variant.options)
            changed_options(PRESETS[options.pop("preset", "default")], options)
        tracking.TRACKERS[variant.kind](backbone, variant.options)


def test_a_stopped_run_goes_on_and_shards_make_one_table(tracking, monkeypatch, tmp_path, capsys):
    output = tmp_path / "table.json"
    rows = ["default", "published procedure", "features, attention output", "standing still"]
    words = ["--clips", "2", "--size", "4", "32", "48", "--points", "3", "--variants", *rows, "--output", str(output)]

    def run(*more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["tracking.py", *words, *more])
        tracking.main()
        return [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("0 ", "1 ")]

    assert len(run("--shard", "1/2")) == 4
    assert not output.exists()
    lost = sorted((tmp_path / "table.parts").glob("*.json"))[0]
    lost.unlink()
    assert len(run("--shard", "1/2")) == 1
    assert len(run("--shard", "2/2")) == 4
    table = json.loads(output.read_text())
    assert [row["variant"] for row in table["rows"]] == rows
    still = table["rows"][3]
    low, middle, high = (still["average_pts_within_thresh"][place] for place in (1, 0, 2))
    assert 0 <= low <= middle <= high <= 1
    difference = still["average_pts_within_thresh"][0] - table["rows"][0]["average_pts_within_thresh"][0]
    assert still["average_pts_within_thresh_minus_default"][0] == pytest.approx(difference, abs=2e-4)
    assert run() == [], "nothing is measured twice"
