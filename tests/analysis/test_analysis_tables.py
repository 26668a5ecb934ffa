"""Tables of counts, their files, and choosing from them."""

from __future__ import annotations

import csv
import json
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest

from corrdit.analysis.calibration import calibrate, interval, preset_values, write_preset
from corrdit.analysis.html_report import harmonic_table, table_rows, write_parquet, write_report
from corrdit.analysis.results import analysis_folder, read_results, write_failure, write_result
from corrdit.analysis.table import MEAN, AnalysisTable, total
from corrdit.files import write_csv
from corrdit.metrics import harmonic_mean

COUNTED = ("hits", "cases", "moving_hits", "moving_cases")


def shares(s: int, n: int, r: int) -> float:
    """Layer 1 at the last step is best, its head 1 best of all."""
    return 0.2 + 0.2 * s + (0.2 if n == 1 else 0) + (0.1 if (s, n, r) == (1, 1, 2) else 0) - 0.01 * r


def test_tables_add_up_and_come_back_from_files(make_table, tmp_path):
    one, other = make_table(shares), make_table(shares, cases=300, seed=1)
    summed = one + other
    assert summed.videos == 2
    assert np.array_equal(summed.hits, one.hits + other.hits)
    assert np.allclose(summed.attention_score("own"), (one.own + other.own) / 40)
    summed.save(tmp_path / "a.npz")
    again = AnalysisTable.load(tmp_path / "a.npz")
    assert again.key == summed.key
    assert again.videos == 2
    assert np.array_equal(again.cross, summed.cross)
    with pytest.raises(ValueError, match="do not add up"):
        one + make_table(shares, heads=1)
    (tmp_path / "b.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"b.npz is not the result of an analysis"):
        AnalysisTable.load(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="no result to sum up"):
        total([])


def test_accuracy_is_nan_without_cases_and_left_out_of_the_csv(make_table, tmp_path):
    table = make_table(shares)
    table.moving_cases[:] = 0
    assert np.isnan(table.accuracy(moving=True)).all()
    assert np.isfinite(table.accuracy()).all()
    rows = table_rows(table)
    assert len(rows) == 2 * 3 * len(table.readings)
    write_csv(tmp_path / "t.csv", rows)
    with open(tmp_path / "t.csv", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert read[0]["moving_pck_4px"] == ""
    best = next(row for row in read if (row["step"], row["layer"], row["reading"]) == ("9", "1", MEAN))
    assert float(best["pck_4px"]) == pytest.approx(0.6)
    assert float(best["confidence"]) == pytest.approx(table.confidence[1, 1, 0] / 40)


def test_harmonic_mean_is_the_metric_over_layers_and_steps(make_table):
    table = make_table(shares)
    found = harmonic_table(table)
    expected = harmonic_mean(
        table.accuracy()[..., 0], table.confidence_score()[..., 0], table.attention_score("cross")[..., 0]
    )
    np.testing.assert_allclose(found, expected)
    table.confidence_cases[0, 0] = 0
    assert harmonic_table(table) is None


def test_parquet_needs_pyarrow_and_says_so(make_table, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        write_parquet(tmp_path / "t.parquet", table_rows(make_table(shares)))
    assert not list(tmp_path.iterdir())


def test_parquet_holds_the_rows(make_table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = table_rows(make_table(shares))
    write_parquet(tmp_path / "t.parquet", rows)
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == rows


def test_calibration_takes_the_best_and_a_head_only_where_it_is_surely_better(make_table):
    found = calibrate([make_table(shares, seed=seed) for seed in range(4)])
    assert (found.best.layer, found.best.step, found.best.head, found.threshold) == (1, 9, 1, 4.0)
    assert found.best.accuracy == pytest.approx(0.68)
    assert found.layers[0] == 1
    assert found.moving
    # Of four videos the head is better in two and worse in two.
    mixed = [
        make_table(lambda s, n, r, sign=sign: shares(s, n, r) + sign * (r == 2), moving=100)
        for sign in (0.3, -0.35, 0.3, -0.3)
    ]
    assert calibrate(mixed).best.head is None
    assert calibrate(mixed).mean.accuracy == pytest.approx(0.6)
    with pytest.raises(ValueError, match="threshold 3 was not measured; accepted are 2, 4 pixels"):
        calibrate(mixed, threshold=3)


def test_calibration_takes_a_low_pass_filter_where_it_is_surely_better(make_table):
    def filtered(s: int, n: int, r: int) -> float:
        return 0.2 + 0.2 * (n == 1) + 0.1 * s + (0.2 if r == 2 else 0)

    tables = [make_table(filtered, heads=0, low_pass=(0.5, 1.0), seed=seed) for seed in range(3)]
    assert tables[0].readings[:3] == (MEAN, "query-key low-pass 0.5", "query-key low-pass 1")
    found = calibrate(tables)
    assert (found.best.layer, found.best.head, found.low_pass) == (1, None, 1.0)
    settings = {"options": {"inference_steps": 10}, "preset": {"tracking": {"combine": "median"}, "layer": 2}}
    assert preset_values(found, settings)["tracking"] == {"low_pass": 1.0}
    plain = [make_table(lambda s, n, r: 0.5 + 0.1 * n - 0.02 * r, heads=0, low_pass=(0.5, 1.0)) for _ in range(3)]
    assert calibrate(plain).low_pass == 0
    assert "tracking" not in preset_values(calibrate(plain), settings)
    inverted = {**settings, "options": {**settings["options"], "noise": "inverted"}}
    assert preset_values(calibrate(plain), inverted)["tracking"] == {"inversion": "ddim"}
    assert preset_values(calibrate(plain), inverted)["noise"] is False


def test_interval_leaves_out_videos_without_cases():
    assert interval(np.array([5, 0]), np.array([10, 0])) == (0.5, 0.5)


def test_videos_without_cases_are_not_counted_as_those_an_interval_rests_on(make_table):
    nothing = make_table(shares, seed=5)
    nothing = replace(nothing, **{name: getattr(nothing, name) * 0 for name in COUNTED})
    one = calibrate([make_table(shares), nothing])
    assert one.videos == 1
    assert "of one video, so without an interval" in one.described()
    two = calibrate([make_table(shares), make_table(shares, seed=1), nothing])
    assert two.videos == 2
    assert "%, 2 videos)" in two.described()
    assert " found within " in two.described()


def test_preset_of_a_calibration_is_read_by_backbone_tracker_guidance_and_transfer(make_table, tmp_path, tiny):
    from corrdit import PointTracker
    from corrdit.integrations.diffusers import Preset, backbone_of
    from corrdit.integrations.diffusers.backbones.published_models import default_layers
    from corrdit.integrations.diffusers.motion_transfer import settings_for

    settings = {"options": {"inference_steps": 10, "noise": "noised", "tokens_per_frame": 64}, "preset": {"layer": 0}}
    write_preset(
        tmp_path / "preset.json",
        preset_values(calibrate([make_table(shares, seed=seed) for seed in range(2)]), settings),
    )
    preset = Preset.from_file(tmp_path / "preset.json")
    read = preset.reading
    assert (read.layer, read.step, read.inference_steps, read.head) == (1, -1, 10, 1)
    assert (read.noise, read.tokens_per_frame, preset.calibrated) == (True, 64, True)
    backbone = backbone_of(tiny.pipe, preset=preset)
    PointTracker(backbone)
    assert default_layers(backbone)[0] == 1
    assert settings_for(backbone).blocks == (1,)
    assert settings_for(tiny).blocks != ()
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a preset"):
        Preset.from_file(tmp_path / "other.json")


def test_report_is_one_page_without_links_outside_and_counts_what_failed(make_table, tmp_path):
    settings = {"options": {"least_motion": 1.5}, "preset": {"layer": 3}, "preset.layer": 3}
    analysis_folder(tmp_path).begin({"model": "a <model>", **settings})
    for seed in range(2):
        write_result(tmp_path, f"clip {seed}", make_table(shares, seed=seed))
    write_failure(tmp_path, "broken", ValueError("the queries hold 3 numbers that are NaN"))
    results = read_results(tmp_path)
    picture = np.zeros((8, 8, 3), np.uint8)
    files = write_report(tmp_path, results, pictures=[("Drawn", picture, "a caption")])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert files == ["report.html", "analysis.csv", "videos.csv"]
    assert "a &lt;model&gt;" in page
    assert "<td>preset: layer</td>" in page
    assert "preset.layer" not in page
    assert "1 videos could not be analysed" in page
    assert "the queries hold 3 numbers that are NaN" in page
    assert page.count("data:image/png;base64,") >= 6
    assert "http" not in page
    assert "<script" not in page
    with open(tmp_path / "videos.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ["clip 0", "clip 1", "broken"]
    assert rows[2]["cases"] == ""
    assert "NaN" in rows[2]["error"]


def test_a_report_of_one_step_has_no_curves_and_the_harmonic_mean_is_no_percentage(make_table, tmp_path, monkeypatch):
    from corrdit.analysis import html_report

    drawn = {}

    def watched(panels, **options):
        drawn.update(dict.fromkeys(panels, options))
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr(html_report, "draw_heatmaps", watched)
    both = make_table(shares)
    names = ("hits", "moving_hits", "cases", "moving_cases", "confidence", "text", "own", "cross")
    names = (*names, "confidence_text", "confidence_own", "confidence_cases", "point_cases", "attention_cases")
    last = replace(both, steps=(9,), timesteps=(19.0,), **{name: getattr(both, name)[1:] for name in names})
    captions = []
    for number, table in enumerate((both, last)):
        folder = tmp_path / str(number)
        analysis_folder(folder).begin({"model": "one"})
        write_result(folder, "a", table)
        write_report(folder, read_results(folder))
        captions.append((folder / "report.html").read_text(encoding="utf-8"))
    for words in ("The best layers by query-key matching", "beside their mean"):
        assert words in captions[0]
        assert words not in captions[1]
    assert drawn["harmonic mean"]["percent"] is False
    assert drawn["confidence in other frames"].get("percent", True)


def test_results_of_other_settings_are_refused_and_failures_alone_are_no_result(tmp_path):
    analysis_folder(tmp_path).begin({"model": "one"})
    analysis_folder(tmp_path).begin({"model": "one"})
    with pytest.raises(ValueError, match="model 'one' \\(now 'two'\\)"):
        analysis_folder(tmp_path).begin({"model": "two"})
    write_failure(tmp_path, "a", ValueError("torn"))
    with pytest.raises(ValueError, match="none of the videos could be analysed \\(1 failed; a: torn"):
        read_results(tmp_path).total()
    with pytest.raises(ValueError, match="holds no analysis"):
        read_results(tmp_path / "videos")
    assert json.loads((tmp_path / "settings.json").read_text(encoding="utf-8")) == {"model": "one"}


def test_results_are_read_one_after_another_so_that_memory_does_not_grow_with_the_videos(
    make_table, tmp_path, monkeypatch
):
    analysis_folder(tmp_path).begin({"model": "one", "options": {"inference_steps": 10}})
    for number in range(8):
        write_result(tmp_path, f"{number:04}", make_table(shares, seed=number, low_pass=(0.5,)))
    alive: weakref.WeakSet[AnalysisTable] = weakref.WeakSet()
    most, load = [], AnalysisTable.load

    def watched(path):
        table = load(path)
        alive.add(table)
        most.append(len(alive))
        return table

    monkeypatch.setattr(AnalysisTable, "load", watched)
    results = read_results(tmp_path)
    assert list(results.tables) == [f"{number:04}" for number in range(8)]
    assert results.total().videos == 8
    write_report(tmp_path, results)
    assert len(most) >= 8
    assert max(most) <= 3
    together = calibrate([make_table(shares, seed=number, low_pass=(0.5,)) for number in range(8)])
    assert results.calibration() == together
    with pytest.raises(KeyError):
        results.tables["0008"]


def test_a_damaged_result_is_named(make_table, tmp_path):
    analysis_folder(tmp_path).begin({"model": "one"})
    write_result(tmp_path, "a", make_table(shares))
    file = tmp_path / "videos" / "a" / "analysis.npz"
    content = bytearray(file.read_bytes())
    content[80:110] = bytes(30)
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"analysis\.npz is not the result of an analysis"):
        read_results(tmp_path).total()


def test_one_video_gives_no_head_and_no_interval(make_table):
    """The best of many heads is better than their mean on any single video."""
    one = calibrate([make_table(shares)])
    assert one.single is not None
    assert one.single.accuracy > one.mean.accuracy
    assert one.best == one.mean
    assert "of one video, so without an interval" in one.described()
    assert calibrate([make_table(shares, seed=seed) for seed in range(6)]).best.head == 1
