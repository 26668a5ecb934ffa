"""`corrdit bench`: what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest

from corrdit.benchmark import measure, plots, runner
from corrdit.benchmark.floors import Ceilings
from corrdit.benchmark.shapes import SHAPES, Shape
from corrdit.cli import main

SHORT = ["bench", "--shapes", "small", "--operations", "hard_displacement,attention_mass", "--rounds", "1"]
FEW = [*SHORT, "--baselines", "folded-chunks"]


@pytest.fixture(autouse=True)
def small_and_known(monkeypatch):
    """Large matrix products and pictures take seconds on a busy machine; commits change under a test."""
    monkeypatch.setattr(plots, "write_plots", lambda rows, folder: [])
    monkeypatch.setattr(measure, "measure_ceilings", lambda device, dtype: Ceilings(0.1, 10.0, 2.0))
    monkeypatch.setattr(runner, "environment", lambda device: SURROUNDINGS)
    monkeypatch.setitem(SHAPES, "small", Shape("small", 2, 8, 3, 4, 5, 3))


SURROUNDINGS = {
    "commit": "0123456789ab", "device": "a processor", "driver": None, "threads": 1, "torch": "2", "triton": "3",
}  # fmt: skip


def rows_in(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def test_everything_is_written_after_a_line_that_says_what_comes(tmp_path, capsys):
    assert main([*FEW, "--output", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "2 measurements (2 operations, 1 shapes) by corrdit auto and up to 1 other ways, float32"
    )
    assert "limits of 0.1 TFLOP/s of matrix products, 10 GB/s copied, 2e9 exponentials/s" in lines[0]
    assert [row["competitor"] for row in rows_in(tmp_path / "new")] == ["corrdit auto", "folded-chunks", "corrdit auto"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"results.json", "table.md"}


def test_resume_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    command = [*FEW, "--output", str(tmp_path), "--resume"]
    assert main([*command, "--minutes", "1e-9"]) == 3
    assert "2 measurements are left" in capsys.readouterr().out
    assert main(command) == 0
    first = rows_in(tmp_path)
    monkeypatch.setattr(runner, "run_piece", None)
    assert main(command) == 0
    assert rows_in(tmp_path) == first
    assert "2 of 2 measurements are in" in capsys.readouterr().out


def test_resume_adds_a_baseline_and_replaces_rows_of_another_commit(tmp_path, monkeypatch):
    command = [*SHORT, "--output", str(tmp_path), "--resume"]
    assert main([*command, "--baselines", "none"]) == 0
    before = rows_in(tmp_path)
    assert main([*command, "--baselines", "materialized"]) == 0
    after = rows_in(tmp_path)
    assert [row for row in after if row["competitor"] == "corrdit auto"] == before
    assert [row["competitor"] for row in after] == ["corrdit auto", "materialized"] * 2
    assert main([*command, "--baselines", "none", "--commit", "later"]) == 0
    assert [row["commit"] for row in rows_in(tmp_path)] == ["later", SURROUNDINGS["commit"]] * 2


def test_options_of_earlier_versions_mean_the_same(capsys):
    assert main([*SHORT, "--rivals", "folded-chunks", "--rival-gigabytes", "1", "--plan"]) == 0
    assert "up to 1 other ways" in capsys.readouterr().out
    assert main([*SHORT, "--rivals", "none", "--plan"]) == 0
    assert "up to 0 other ways" in capsys.readouterr().out


def test_rows_are_on_the_disk_when_a_later_measurement_dies(tmp_path, monkeypatch, capsys):
    whole = runner.run_piece

    def dying(piece, *given):
        if piece.operation == "attention_mass":
            # Also where nothing can be written any more, as when the process is killed.
            assert {row["operation"] for row in rows_in(tmp_path)} == {"hard_displacement:logits"}
            raise KeyboardInterrupt
        yield from whole(piece, *given)

    monkeypatch.setattr(runner, "run_piece", dying)
    assert main([*FEW, "--output", str(tmp_path)]) == 130
    assert {row["operation"] for row in rows_in(tmp_path)} == {"hard_displacement:logits"}
    assert not list(tmp_path.glob("*.part"))


def test_redraw_takes_what_is_there(tmp_path, capsys):
    assert main([*FEW, "--output", str(tmp_path)]) == 0
    (tmp_path / "table.md").unlink()
    assert main(["bench", "--redraw", "--output", str(tmp_path)]) == 0
    assert "| hard_displacement:logits |" in (tmp_path / "table.md").read_text()


def test_our_own_failure_is_status_1(monkeypatch, capsys):
    def fails(work, device):
        raise ValueError("no such kernel")

    monkeypatch.setattr(runner, "peak_extra_bytes", fails)
    assert main([*FEW, "--baselines", "none"]) == 1
    assert "attention_mass | forward | small | corrdit auto" in capsys.readouterr().err


def test_the_plan_of_a_device_that_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--plan", "--device", "cuda", "--shapes", "cogvideox-5b"]) == 0
    out = capsys.readouterr().out
    assert "as if it were an H200" in out
    assert re.search(r"About \d+ minutes; compilers run \d+ times for other ways", out)
    assert main(["bench", "--plan", "--device", "cuda", "--shapes", "cogvideox-5b", "--minutes", "45"]) == 0
    assert re.search(r"About \d+ minutes, within 45;", capsys.readouterr().out)
    assert "2.4 ms" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "dance"], "there is no operation 'dance'; there are soft_displacement:logits,"),
        (["--operations", ""], "there is no operation ''"),
        (["--shapes", "round"], "there is no shape 'round'; there are cogvideox-2b,"),
        (["--baselines", "steam"], "there is no baseline 'steam'; there are materialized,"),
        (["--backends", "steam"], "there is no backend 'steam'; there are auto,"),
        (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (["--device", "teapot"], "--device must be cuda or cpu, got 'teapot'"),
        (["--device", "mps"], "--device must be cuda or cpu, got 'mps'"),
        (["--device", "cuda:99"], "there is no such CUDA device here; accepted are cpu"),
        (["--rounds", "0"], "--rounds must be above 0, got 0"),
        (["--minutes", "-1"], "--minutes must be above 0, got -1"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--check-frames", "0"], "--check-frames must be above 0, got 0"),
        (["--baseline-gigabytes", "0"], "--baseline-gigabytes must be above 0, got 0"),
        (["--resume"], "--resume goes on with the results of a folder; name it with --output DIR"),
        (["--redraw"], "--redraw needs --output DIR"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    assert main([*FEW, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_folders_that_will_not_do(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*FEW, "--output", str(tmp_path / "file")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    (tmp_path / runner.RESULTS_FILE).write_text("{}")
    assert main([*FEW, "--output", str(tmp_path)]) == 2
    assert "is there already; add --resume" in capsys.readouterr().err
    assert main([*FEW, "--output", str(tmp_path), "--resume"]) == 2
    assert "holds no rows that corrdit bench wrote" in capsys.readouterr().err
    assert (tmp_path / runner.RESULTS_FILE).read_text() == "{}"


def test_shapes_that_do_not_fit_in_memory(monkeypatch, capsys):
    monkeypatch.setattr("corrdit.cli.bench_run._free_bytes", lambda device: 2.0**30)
    assert main([*FEW, "--shapes", "small,hunyuanvideo-720p"]) == 2
    assert "--shapes hunyuanvideo-720p needs 1" in capsys.readouterr().err
    monkeypatch.setattr("corrdit.cli.bench_run._free_bytes", lambda device: 2.0**23)
    assert main([*FEW, "--shapes", "default", "--plan"]) == 0
    assert "small-8-frames is left out: it needs" in capsys.readouterr().out


def test_the_lists(capsys):
    assert main(["bench", "--operations", "list"]) == 0
    out = capsys.readouterr().out
    assert "cogvideox-5b" in out
    assert "FlexAttention" in out
