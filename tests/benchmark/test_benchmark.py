"""The rivals compute the same functions, and a wrong result never gets a time."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from corrdit import TokenGrid, ops
from corrdit.benchmark import contests, runner
from corrdit.benchmark.baselines import attention_positions, folded_chunks, materialized, window_gather
from corrdit.benchmark.contests import CONTESTS, Rival
from corrdit.benchmark.measure import Ceilings, measure_ceilings
from corrdit.benchmark.plots import write_plots
from corrdit.benchmark.runner import Settings, run_contests, write_rows
from corrdit.benchmark.shapes import SHAPES, Shape
from corrdit.cli import main

SETTINGS = Settings(
    device=torch.device("cpu"), dtype=torch.float32, backends=("auto",), rounds=1, rivals=True, rival_bytes=2**30
)
SMALL = Shape("small", 2, 8, 3, 4, 5, 3)


@pytest.fixture
def known_ceilings(monkeypatch):
    """Large matrix products take seconds on a busy machine, and say nothing about the rest."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype: Ceilings(0.1, 10.0))


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(3, 4, 5)
    return grid, *(torch.randn(2, 3, grid.tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize(
    ("rival", "options"),
    [
        (materialized.soft_displacement, {}),
        (folded_chunks.soft_displacement, {}),
        (attention_positions.soft_displacement, {}),
        (lambda *given, **o: attention_positions.soft_displacement(*given, heads="probabilities", **o),
         {"heads": "probabilities"}),
        (lambda *given, **o: window_gather.soft_displacement(*given, window=1, **o), {"window": 1}),
    ],
    ids=["materialized", "folded", "attention, logits", "attention, probabilities", "windows"],
)  # fmt: skip
def test_rivals_of_soft_displacement(tensors, rival, options):
    grid, q, k, _ = tensors
    expected = ops.soft_displacement(q, k, grid, temperature=2.0, backend="reference", **options)
    torch.testing.assert_close(rival(q, k, grid, temperature=2.0).to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


def test_rivals_of_the_other_operations(tensors):
    grid, q, k, v = tensors
    assert torch.equal(materialized.hard_displacement(q, k, grid), ops.hard_displacement(q, k, grid))
    for found, expected in zip(materialized.match(q, k, grid, source=1), ops.match(q, k, grid, source=1), strict=True):
        torch.testing.assert_close(found, expected)
    with_text = TokenGrid(2, 4, 5, text_tokens=20)
    for renormalize in (True, False):
        torch.testing.assert_close(
            materialized.frame_local_attention(q, k, v, with_text, renormalize=renormalize),
            ops.frame_local_attention(q, k, v, with_text, renormalize=renormalize),
        )


@pytest.mark.slow
def test_ceilings_of_this_machine():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e-4 < ceilings.matmul_tflops < 100
    assert 0.1 < ceilings.copy_gigabytes < 10_000


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.parametrize(
    "names",
    [["soft_displacement, window", "match, probabilities"], pytest.param(list(CONTESTS), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_contests_have_right_rows_with_times_and_versions(tmp_path, names):
    rows = list(run_contests(names, [SMALL], SETTINGS))
    assert {row["operation"] for row in rows} == set(names)
    for row in rows:
        assert row["shape"]["heads"] == 2
        assert row["commit"] is None or len(row["commit"]) >= 12
        assert row["torch"] == torch.__version__
        assert ("milliseconds" in row) != ("left_out" in row)
        if "milliseconds" in row:
            assert row["within_tolerance"]
            assert 0 < row["milliseconds"]["least"] <= row["milliseconds"]["median"] <= row["milliseconds"]["most"]
            assert row["share_of_matmul_ceiling"] > 0
        else:
            assert row["left_out"] == "runs on cuda only"
    write_rows(tmp_path / "results.json", "corrdit bench", rows)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == json.loads(json.dumps(rows))
    for path in write_plots(rows, tmp_path, "results"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("known_ceilings")
def test_a_wrong_result_gets_no_time(monkeypatch):
    name = "hard_displacement, logits"
    wrong = {"one token off": Rival(lambda s: (ops.hard_displacement(s.q, s.k, s.grid) + 1,))}
    monkeypatch.setitem(contests.CONTESTS, name, dataclasses.replace(CONTESTS[name], rivals=wrong))
    rows = {row["competitor"]: row for row in run_contests([name], [SMALL], SETTINGS)}
    assert "milliseconds" in rows["corrdit auto"]
    assert "wrong" in rows["one token off"]["left_out"]
    assert "milliseconds" not in rows["one token off"]


@pytest.mark.usefixtures("known_ceilings")
def test_a_rival_that_does_not_fit_is_left_out():
    settings = dataclasses.replace(SETTINGS, rival_bytes=1000)
    rows = list(run_contests(["hard_displacement, logits"], [SMALL], settings))
    assert "GiB for its score maps" in next(row for row in rows if "materialized" in row["competitor"])["left_out"]


def test_the_shapes_of_published_models():
    assert SHAPES["cogvideox-5b"].grid.tokens == 226 + 13 * 30 * 45
    assert SHAPES["hunyuanvideo-720p"].grid.video_tokens == 33 * 45 * 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "dance"], "no operation 'dance'"),
        (["--shapes", "round"], "no shape 'round'"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "teapot"], "--device must be"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--shapes", "tiny", "--operations", "cost_rows", "--backends", "steam"], "--backends must be among"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_the_lists(capsys):
    assert main(["bench", "--operations", "list"]) == 0
    assert "cogvideox-5b" in capsys.readouterr().out
