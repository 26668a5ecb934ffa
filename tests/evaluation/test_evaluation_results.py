"""Result files: names that cannot lead out of the folder, settings that must fit, tables from the files alone."""

from __future__ import annotations

import csv
import json

import pytest

from corrdit.evaluation import EvaluationResults, write_tables
from corrdit.evaluation.results import LONGEST_NAME, file_name
from corrdit.metrics.tapvid import METRIC_NAMES

SETTINGS = {
    "data": {"set": "davis", "mode": "first"},
    "trackers": {"still": {"kind": "still"}},
    "videos": ["ant", "bee", "cat", "dog"],
}


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "..", ".", "", "0001_of_0010/0003", ".hidden", "a" * 500, "Ä ä/\0", "a%2Fb"],
)
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    results = EvaluationResults(tmp_path)
    file = results.record_file(name, name)
    assert file.resolve().is_relative_to(tmp_path / "videos")
    assert file.parent.parent == tmp_path / "videos"
    assert not file.name.startswith(".")
    assert len(file.name) <= LONGEST_NAME + 30
    results.write_record(name, name, {"video": name, "figures": None})
    assert results.record(name, name) == {"video": name, "figures": None}


def test_names_that_differ_have_files_that_differ():
    names = ["a/b", "a%2Fb", "a b", "..", ".", "", "a" * 200, "a" * 201]
    assert len({file_name(name) for name in names}) == len(names)


def test_a_result_replaces_a_failure_and_failures_are_forgotten(tmp_path):
    results = EvaluationResults(tmp_path)
    results.write_failure("still", "ant", "no picture")
    results.write_failure("still", "bee", "no picture")
    assert results.any_failure(["ours", "still"])
    assert not results.any_failure(["ours"])
    assert not results.is_done(["still"], "ant")
    results.write_record("still", "ant", {"video": "ant", "figures": None})
    assert results.failure("still", "ant") is None
    assert [failure["video"] for failure in results.failures("still")] == ["bee"]
    results.forget_failures(["still"])
    assert not results.any_failure(["still"])
    assert results.is_done(["still"], "ant")
    assert not results.is_done(["still", "ours"], "ant")


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    results = EvaluationResults(tmp_path)
    results.write_record("still", "ant", {"video": "ant", "figures": None})
    (tmp_path / "videos" / "still" / ".bee.json.12-ab.part").write_text("{")
    (tmp_path / "pictures" / "still" / ".part-x").mkdir(parents=True)
    (tmp_path / "pictures" / "still" / ".part-x" / "tracks.mp4").write_bytes(b"half")
    results.remove_leftovers()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["ant.json"]


def test_other_settings_are_refused_and_other_trackers_join(tmp_path):
    results = EvaluationResults(tmp_path)
    assert results.settings_with(SETTINGS) == SETTINGS
    results.write_settings(SETTINGS)
    with pytest.raises(ValueError, match=r"other settings of data: mode 'first' \(now 'strided'\)"):
        results.settings_with({**SETTINGS, "data": {"set": "davis", "mode": "strided"}})
    with pytest.raises(ValueError, match=r"other settings of still: kind 'still' \(now 'patches'\)"):
        results.settings_with({**SETTINGS, "trackers": {"still": {"kind": "patches"}}})
    joined = results.settings_with({**SETTINGS, "trackers": {"ours": {"kind": "ours"}}})
    assert list(joined["trackers"]) == ["still", "ours"]
    (tmp_path / "settings.json").write_text("{ half")
    with pytest.raises(ValueError, match="not a file of an evaluation"):
        results.settings()


def test_tables_tell_every_video_from_its_file(tmp_path):
    with pytest.raises(ValueError, match="holds no evaluation"):
        write_tables(tmp_path)
    results = EvaluationResults(tmp_path)
    results.write_settings(SETTINGS)
    figures = {name: (index + 1) / 32 for index, name in enumerate(METRIC_NAMES)}
    results.write_record("still", "ant", {"video": "ant", "frames": 9, "queries": 2, "figures": figures})
    results.write_record("still", "bee", {"video": "bee", "frames": 9, "queries": 0, "figures": None})
    results.write_failure("still", "cat", "no picture, nowhere")
    (summary,) = write_tables(tmp_path)
    assert (summary.videos, summary.without_visible_points, summary.broken, summary.left) == (
        1,
        ["bee"],
        {"cat": "no picture, nowhere"},
        ["dog"],
    )
    assert summary.figures == figures
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["trackers"][0]["average_jaccard"] == figures["average_jaccard"]
    assert table["trackers"][0]["broken_videos"] == {"cat": "no picture, nowhere"}
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    assert (row["tracker"], row["videos"], row["broken_videos"], row["videos_left"]) == ("still", "1", "1", "1")
    assert float(row["jaccard_16"]) == figures["jaccard_16"]
    rows = list(csv.DictReader((tmp_path / "videos.csv").open()))
    assert [row["status"] for row in rows] == ["scored", "no visible points", "broken", "left"]
    assert rows[2]["error"] == "no picture, nowhere"


def test_a_ratio_without_cases_is_no_number_in_the_files(tmp_path):
    results = EvaluationResults(tmp_path)
    results.write_settings({**SETTINGS, "videos": ["ant"]})
    figures = {name: None for name in METRIC_NAMES} | {"occlusion_accuracy": 1.0}
    results.write_record("still", "ant", {"video": "ant", "figures": figures})
    (summary,) = write_tables(tmp_path)
    assert (summary.videos, summary.without_visible_points) == (0, ["ant"])
    assert json.loads((tmp_path / "table.json").read_text())["trackers"][0]["occlusion_accuracy"] is None
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_record("still", "ant", {"video": "ant", "figures": float("nan")})
    assert results.record("still", "ant")["figures"] == figures
