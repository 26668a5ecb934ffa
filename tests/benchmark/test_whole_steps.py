"""The script that times whole denoising steps: all ways of one run, it goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
WAYS = ["plain", "capture", "removed", "dropped", "one branch", "transfer"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("whole_steps")
    sys.modules.pop("whole_steps", None)


@pytest.fixture
def run(script, monkeypatch, tmp_path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the script on the embedded model at a tiny size: the status, and what it wrote."""

    def start(*options: str) -> tuple[int, dict[str, Any]]:
        given = ["--device", "cpu", "--models", "embedded", "--size", "8", "32", "32", "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["whole_steps.py", *given, "--output", str(tmp_path / "out.json"), *options])
        status = script.main()
        return status, json.loads((tmp_path / "out.json").read_text())

    return start


def test_every_way_of_a_step_is_measured_beside_its_plan_once(run, script, monkeypatch, capsys):
    status, result = run()
    assert status == 0
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == WAYS
    assert {"command", "commit", "device", "torch", "triton"} < set(result)
    for row in rows.values():
        assert row["milliseconds"] > 0
        assert row["tokens"] == 8 * 8 * 8
        assert abs(row["plan_error"]) < 0.1
    assert rows["plain"]["over_plain"] == 1
    # A third branch is one more, guidance is two of them and the layers that it perturbs.
    assert rows["one branch"]["peak_bytes"] < rows["plain"]["peak_bytes"] < rows["removed"]["peak_bytes"]
    assert "| embedded | transfer |" in capsys.readouterr().out
    monkeypatch.setattr(script, "measured", None)
    assert run() == (0, result)


def test_it_stops_when_its_minutes_are_over(run, script, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps({**script.facts(torch.device("cpu")), "rows": []}))
    status, result = run("--minutes", "0")
    assert (status, result["rows"]) == (3, [])


def test_a_file_of_another_device_is_left_alone(run, script, tmp_path, capsys):
    held = json.dumps({**script.facts(torch.device("cpu")), "device": "another", "rows": []})
    (tmp_path / "out.json").write_text(held)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "was measured with another device; name another" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == held


@pytest.mark.slow
def test_a_way_without_enough_memory_is_a_row_that_says_so(run, script, monkeypatch):
    def full(*arguments: object, **options: object) -> object:
        raise MemoryError

    monkeypatch.setattr(script, "CrossAttentionGuidance", full)
    _, result = run()
    failed = {row["way"]: row["failed"] for row in result["rows"] if "failed" in row}
    assert failed == dict.fromkeys(["removed", "dropped"], "out of memory")
    assert [row["way"] for row in result["rows"]] == WAYS
