"""Confidence and attention point by point, and what they become in tables, against DiffTrack's released code."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from corrdit import TokenGrid
from corrdit.analysis import released_scores
from corrdit.analysis.counts import TrueTracks, attention_sums
from corrdit.analysis.html_report import harmonic_table, table_rows
from corrdit.analysis.point_readings import read_attention
from corrdit.analysis.protocols import analysis_options
from corrdit.analysis.released_tables import write_released_tables
from corrdit.analysis.results import AnalysisResults
from corrdit.analysis.sheets import write_sheet
from corrdit.metrics.harmonic import harmonic_mean

SCORES = [f"{kind}_{part}" for kind in ("confidence", "attention") for part in ("text", "self", "cross")]


@pytest.fixture(scope="module", params=[0, 1])
def case(request, golden):
    numbers = golden("analysis_confidence")
    heads, head_dim, frames, height, width, text, seed = numbers[f"{request.param}_meta"].tolist()
    shape = (1, heads, text + frames * height * width, head_dim)
    q, k = (
        2 * torch.from_numpy(np.random.default_rng(s).standard_normal(shape, dtype=np.float32))
        for s in (seed, seed + 100)
    )
    expected = {name.split("_", 1)[1]: value for name, value in numbers.items() if name[0] == str(request.param)}
    return q, k, TokenGrid(frames, height, width, text_tokens=text), expected


def test_every_score_is_the_released_one(case):
    q, k, grid, expected = case
    points, visibility = torch.from_numpy(expected["points_xy"]), torch.from_numpy(expected["visibility"])
    found = released_scores(q, k, grid, points, visibility)
    assert set(found) == {*SCORES, *(f"{name}_points" for name in SCORES)}
    for name in found:
        assert found[name].shape == expected[name].shape, name
        error = np.abs(found[name].numpy() - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 1e-5, (name, error)
    precise = released_scores(q.double(), k.double(), grid, points, visibility)
    assert precise["confidence_cross"].dtype == torch.float64
    assert abs(float(precise["confidence_cross"]) / float(expected["confidence_cross"]) - 1) < 1e-5


def test_the_published_protocol_puts_them_into_the_table(case):
    q, k, grid, expected = case
    points, visible = torch.from_numpy(expected["points_xy"]), torch.from_numpy(expected["visibility"][0])
    groups = ((0,), *(tuple(range(first, first + 4)) for first in range(1, 49, 4)))
    options = analysis_options("published", {"per_head": False})
    reading = read_attention(q, k, grid, None, points=points, stride=(16, 16), options=options)
    sums = attention_sums(reading, TrueTracks(points.expand(49, -1, -1), visible, groups), options.average)
    found = {
        "confidence_cross": sums.confidence / sums.confidence_cases,
        "confidence_text": sums.confidence_text / sums.point_cases,
        "confidence_self": sums.confidence_own / sums.point_cases,
        "attention_text": sums.text / sums.attention_cases,
        "attention_self": sums.own / sums.attention_cases,
        "attention_cross": sums.cross / sums.attention_cases,
    }
    for name, value in found.items():
        assert abs(float(value[0]) / float(expected[name]) - 1) < 1e-5, name
    pooled = attention_sums(reading, TrueTracks(points.expand(49, -1, -1), visible, groups))
    assert pooled.point_cases == pooled.attention_cases == int(visible[0].sum())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visibility": torch.ones(48, 3, dtype=torch.bool)}, "48 video frames, which are not 1 and a multiple of 2"),
        ({"visibility": torch.ones(9, 4, dtype=torch.bool)}, r"visibility must be boolean \[T, 3\]"),
        ({"visibility": torch.ones(9, 3)}, "got torch.float32"),
        ({"points": torch.zeros(3, 3)}, r"points must be finite \[P, 2\]"),
        ({"size": (50, 64)}, "size 50 x 64"),
        ({"q": torch.zeros(2, 1, 100, 4)}, r"q must be \[1, H, N, D\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "q": torch.zeros(1, 1, 4 + 3 * 32, 4),
        "k": torch.zeros(1, 1, 4 + 3 * 32, 4),
        "grid": TokenGrid(3, 4, 8, text_tokens=4),
        "points": torch.zeros(3, 2),
        "visibility": torch.ones(9, 3, dtype=torch.bool),
        "size": (64, 128),
    }
    with pytest.raises(ValueError, match=message):
        released_scores(**{**given, **change})


def test_published_figures_are_means_of_videos_and_pooled_ones_are_not(make_table):
    """Two videos, one with four times the cases: the mean of their shares, in the harmonic mean too."""
    one = make_table(lambda s, n, r: 0.1 * (s + n + 1), seed=1)
    other = make_table(lambda s, n, r: 0.9 - 0.1 * s - 0.05 * n * n, cases=400, moving=40, seed=2)
    other.confidence_cases[:], other.point_cases[:], other.attention_cases[:] = 10, 50, 160
    tables = {"a": one, "b": other}
    pooled = AnalysisResults({}, tables, {}).total()
    published = AnalysisResults({"options": {"average": "released"}}, tables, {}).total()
    assert (pooled.videos, published.videos) == (2, 2)
    assert (pooled.of_videos, published.of_videos) == (False, True)
    ways = [
        lambda table: table.accuracy(),
        lambda table: table.accuracy(2.0, moving=True),
        *(lambda table, part=part: table.confidence_score(part) for part in ("text", "own", "cross")),
        *(lambda table, part=part: table.attention_score(part) for part in ("text", "own", "cross")),
    ]
    for figures in ways:
        mean = (figures(one) + figures(other)) / 2
        np.testing.assert_allclose(figures(published), mean, rtol=1e-12)
        assert np.abs(figures(pooled) - mean).max() > 1e-3
    layered = [figures(published)[..., 0].T for figures in (ways[0], ways[4], ways[7])]
    np.testing.assert_allclose(harmonic_table(published), harmonic_mean(*layered).T)
    (row, *_), (pooled_row, *_) = table_rows(published), table_rows(pooled)
    assert (row["cases_are"], row["cases"]) == ("videos", 2)
    assert (pooled_row["cases_are"], pooled_row["cases"]) == ("positions", 500)
    assert {"confidence", "confidence_text", "confidence_own", "attention_text"} < row.keys()
    choice = AnalysisResults({"options": {"average": "released"}}, tables, {}).calibration()
    assert choice.best.accuracy == pytest.approx(published.accuracy(choice.threshold, moving=True).max())


def sheet(path) -> list[list[str | float | None]]:
    """The cells of a workbook's only sheet, by their names."""
    space = {"m": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        root = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    rows = []
    for row in root.findall(".//m:row", space):
        cells = {}
        for cell in row.findall("m:c", space):
            text = cell.find("m:is/m:t", space)
            cells[cell.get("r")] = float(cell.find("m:v", space).text) if text is None else text.text
        columns = [chr(ord("A") + n) + row.get("r") for n in range(5)]
        rows.append([cells.get(name) for name in columns])
    return rows


def test_columns_of_a_sheet_go_on_behind_z(tmp_path):
    write_sheet(tmp_path / "wide.xlsx", [[float(n) for n in range(30)], ["<&>", None, float("nan")]])
    with zipfile.ZipFile(tmp_path / "wide.xlsx") as archive:
        text = archive.read("xl/worksheets/sheet1.xml").decode()
    assert '<c r="Z1"><v>25.0</v></c><c r="AA1"><v>26.0</v></c>' in text
    assert '<row r="2"><c r="A2" t="inlineStr"><is><t>&lt;&amp;&gt;</t></is></c></row>' in text
    before = (tmp_path / "wide.xlsx").read_bytes()
    write_sheet(tmp_path / "wide.xlsx", [[float(n) for n in range(30)], ["<&>", None, float("nan")]])
    assert (tmp_path / "wide.xlsx").read_bytes() == before


def test_tables_are_written_in_the_released_formats(make_table, tmp_path):
    """Read back as the released scripts read them, and worked out from the files alone."""
    shares = (lambda s, n, r: 0.1 * (s + n + 1), lambda s, n, r: 0.9 - 0.1 * s - 0.05 * n * n)
    tables = {
        name: make_table(share, seed=n) for n, (name, share) in enumerate(zip(("000", "005"), shares, strict=True))
    }
    found = write_released_tables(tmp_path, tables)
    names = ["harmonic_mean.csv", "total_attention_score.xlsx", "total_confidence_score.xlsx", "total_feat_acc.csv"]
    assert [file.name for file in found] == [*names, "total_qk_acc.csv"]
    root = tmp_path / "released"
    lines = (root / "005" / "qk_acc.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "Layer 1: 85.0000, 75.0000"
    assert (root / "005" / "feat_acc.txt").is_file()
    # As `parse_instance_values` reads lines: every number, the layer's too.
    texts = [(root / name / "qk_acc.txt").read_text(encoding="utf-8").splitlines() for name in tables]
    numbers = [[re.findall(r"[-+]?\d*\.\d+|\d+", line) for line in lines] for lines in texts]
    parsed = np.array(numbers, dtype=float)
    total = np.loadtxt(root / "total_qk_acc.csv", delimiter=",")
    np.testing.assert_allclose(total, parsed.mean(0), atol=5e-5)
    assert total[:, 0].tolist() == [0, 1, 2]
    sheets = {}
    for file, score in (("confidence_score", "confidence_score"), ("attention_score", "attention_score")):
        header, *own = sheet(root / "000" / f"{file}.xlsx")
        body = sheet(root / f"total_{file}.xlsx")
        assert header == ["timestep", "type", "layer0", "layer1", "layer2"]
        assert len(own) == len(body) == 6
        assert [row[:2] for row in body[:4]] == [
            ["timestep3", "self"],
            [None, "cross"],
            [None, "text"],
            ["timestep9", "self"],
        ]
        sheets[file] = np.array([row[2:] for row in body if row[1] == "cross"])
        each = [np.round(getattr(table, score)("cross")[..., 0], 4) for table in tables.values()]
        np.testing.assert_allclose(sheets[file], np.mean(each, axis=0))
    harmonic = np.loadtxt(root / "harmonic_mean.csv", delimiter=",")
    expected = harmonic_mean(total[:, 1:].T, sheets["confidence_score"], sheets["attention_score"])
    np.testing.assert_allclose(harmonic, expected, rtol=1e-12)
    assert harmonic.shape == (2, 3)
    write_released_tables(tmp_path, {"000": tables["000"]})
    assert not (root / "005").exists()
    with pytest.raises(ValueError, match="no result to write"):
        write_released_tables(tmp_path, {})


def test_a_video_without_cases_is_in_no_mean(make_table):
    one, empty = make_table(lambda s, n, r: 0.5), make_table(lambda s, n, r: 0.0)
    for name in ("cases", "moving_cases", "hits", "moving_hits"):
        getattr(empty, name)[:] = 0
    published = one.video_means() + empty.video_means()
    assert np.all(published.accuracy() == 0.5)
    with pytest.raises(ValueError, match="do not add up"):
        one + replace(one.video_means())
