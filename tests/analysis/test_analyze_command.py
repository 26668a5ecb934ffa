"""`corrdit analyze` and `corrdit calibrate` as a user runs them, and the Lightning module, on a tiny model."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from corrdit.analysis.results import read_results
from corrdit.analysis.sources import AnalysisItem, folder_items
from corrdit.analysis.table import AnalysisTable
from corrdit.cli import main
from corrdit.cli.analysis_options import chosen_steps
from corrdit.integrations.diffusers.backbones import loading
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.video import write_video


@pytest.fixture
def with_tiny(monkeypatch):
    """Every command finds the tiny model where it loads one."""
    loaded = []

    def load(name, **options):
        loaded.append(name)
        return tiny_backbone("cogvideox-rotary")

    monkeypatch.setattr(loading, "load_backbone", load)
    return loaded


@pytest.fixture
def videos(tmp_path, moving_video) -> Path:
    """Two videos with tracks and one that is broken."""
    folder = tmp_path / "videos"
    folder.mkdir()
    video, xy, visible = moving_video
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", video, 8.0)
        np.savez(folder / f"{name}.npz", video=video, xy=xy, visible=visible)
    (folder / "torn.mp4").write_bytes(b"not a video")
    np.savez(folder / "torn.npz", xy=xy, visible=visible)
    return folder


def analyze(*arguments: str | Path) -> int:
    return main(["analyze", *map(str, arguments)])


def test_a_folder_gives_one_report_a_broken_video_is_counted_and_a_second_run_goes_on(
    with_tiny, videos, tmp_path, capsys
):
    output = tmp_path / "out"
    given = ["--videos", videos, "--output", output, "--steps", "spread:2", "--layers", "0,-1", "--calibrate"]
    assert analyze(*given) == 2
    out, err = capsys.readouterr()
    assert "2 videos analysed, 1 could not be" in out
    pictures = [path for path in (output / "pictures").rglob("*") if path.is_file()]
    assert f"  {output}/report.html\n" in out
    assert f"  {output}/pictures: {len(pictures)} files\n" in out
    assert out.count("pictures/") == 0
    assert "torn.mp4" in err
    assert "Traceback" not in err
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 10
    assert "torn.mp4" in page
    for section in ("Heads", "Principal components", "Tracks", "Attention maps of chosen points"):
        assert f"<h2>{section}</h2>" in page
    with open(output / "analysis.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(row["step"], row["layer"]) for row in rows} == {(s, n) for s in ("24", "49") for n in ("0", "2")}
    counted = 2 * (read_results(output).tables["a.mp4"].cases[0, 0, 0])
    assert int(rows[0]["cases"]) == counted
    preset = json.loads((output / "preset.json").read_text(encoding="utf-8"))
    assert preset["layer"] in (0, 2)
    assert preset["source"].startswith("calibrated: ")

    result = output / "videos" / "a.mp4" / "analysis.npz"
    before = result.stat().st_mtime_ns
    (output / "videos" / "b.mp4" / "analysis.npz").unlink()
    assert analyze(*given, "--pictures", 0) == 2
    assert result.stat().st_mtime_ns == before
    assert (output / "videos" / "b.mp4" / "analysis.npz").is_file()
    capsys.readouterr()
    assert analyze(*given, "--noise", "clean") == 2
    assert "made with other settings" in capsys.readouterr().err


def test_calibrate_writes_the_preset_of_an_analysis(with_tiny, videos, tmp_path, capsys):
    output = tmp_path / "out"
    assert analyze("--videos", videos, "--output", output, "--steps=-1", "--pictures", 0, "--per-head", "false") == 2
    capsys.readouterr()
    assert main(["calibrate", "--analysis", str(output), "--output", str(tmp_path / "preset.json")]) == 0
    preset = json.loads((tmp_path / "preset.json").read_text(encoding="utf-8"))
    assert (preset["step"], preset["head"], preset["inference_steps"]) == (-1, None, 50)
    capsys.readouterr()
    assert main(["calibrate", "--analysis", str(tmp_path), "--output", str(tmp_path / "p.json")]) == 2
    assert "holds no analysis" in capsys.readouterr().err
    arguments = ["calibrate", "--analysis", str(output), "--output", str(tmp_path / "p.json"), "--threshold", "5"]
    assert main(arguments) == 2
    assert "threshold 5 was not measured; accepted are 4, 8, 16" in capsys.readouterr().err


def test_prompts_become_a_data_set_and_a_report(tiny_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("# the set\na dog runs\n\na boat\n", encoding="utf-8")
    output = tmp_path / "out"
    call = '{"num_frames": 9, "height": 64, "width": 64}'
    given = ["--prompts", tmp_path / "prompts.txt", "--output", output, "--steps", "0,1", "--inference-steps", "2"]
    given += ["--model", tiny_folder, "--pipeline", call, "--pictures", 0]
    assert analyze(*given, "--tracker", "patches") == 0
    assert (output / "dataset" / "prompt.txt").read_text(encoding="utf-8") == "a dog runs\na boat\n"
    assert np.load(output / "dataset" / "tracks" / "001.npy").shape == (1, 9, 100, 2)
    assert len(read_results(output).tables) == 2
    # Other prompts for the videos that are there would say of each that it shows what it does not.
    (tmp_path / "prompts.txt").write_text("a cat sleeps\na boat\n", encoding="utf-8")
    capsys.readouterr()
    assert analyze(*given, "--tracker", "patches") == 2
    assert "holds video 000 of 'a dog runs', but the prompt is now 'a cat sleeps'" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("a dog runs\n", encoding="utf-8")
    assert analyze(*given, "--tracker", "patches") == 2
    assert "video 001 of 'a boat', but there is no such prompt now" in capsys.readouterr().err
    assert (output / "dataset" / "prompt.txt").read_text(encoding="utf-8") == "a dog runs\na boat\n"
    assert analyze(*given) == 2
    assert "--prompts needs --tracker" in capsys.readouterr().err
    # The data set is a source of its own.
    again = ["--difftrack", output / "dataset", "--output", tmp_path / "again", "--steps=-1", "--pictures", 0]
    assert analyze(*again, "--max-frames", 4, "--model", tiny_folder) == 0


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "exactly one of --world, --videos"),
        (["--world", "1", "--videos", "x"], "given are --world, --videos"),
        (["--world", "0"], "at least 1 of each is needed"),
        (["--world", "1", "--steps", "many"], "--steps many is not understood"),
        (["--world", "1", "--layers", "99"], "layer 99 is outside"),
        (["--world", "1", "--similarity", "l2"], "similarity must be one of"),
        (["--world", "1", "--pictures", "-1"], "--pictures -1"),
        (["--videos", "nowhere"], "is not a folder"),
        (["--tapvid", "nowhere.pkl"], "does not exist"),
        (["--difftrack", "nowhere"], "holds no tracks"),
        (["--prompts", "nowhere.txt", "--tracker", "patches"], "is not a text file"),
        (["--tapvid", "x", "--processes", "2"], "--processes does not share out"),
    ],
)
def test_bad_input_is_one_line(with_tiny, tmp_path, capsys, given, message):
    assert analyze("--output", tmp_path / "out", *given) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_parquet_is_refused_before_the_work_where_it_cannot_be_written(with_tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("corrdit.analysis.html_report.importlib.util.find_spec", lambda name: None)
    assert analyze("--world", 1, "--output", tmp_path / "out", "--parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err
    assert with_tiny == []


def test_steps_are_spread_to_the_last_one():
    assert chosen_steps("spread:4", 50) == (11, 24, 37, 49)
    assert chosen_steps("spread:90", 3) == (0, 1, 2)
    assert chosen_steps("all", 50) is None
    assert chosen_steps("3,-1", 50) == (3, -1)


def test_lightning_analyses_each_video_once_and_goes_on(videos, tmp_path, tiny):
    lightning = pytest.importorskip("lightning")
    from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule

    output = tmp_path / "out"
    settings = {"output": output, "options": {"steps": (-1,), "per_head": False, "features": False}}

    def predict(items: list[AnalysisItem], **changes) -> AnalysisDataModule:
        data = AnalysisDataModule(items, output=output)
        trainer = lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False,
        )  # fmt: skip
        trainer.predict(AnalysisModule(tiny, **{**settings, **changes}), data, return_predictions=False)
        return data

    items = folder_items(videos)
    predict(items[:1])
    data = predict(items)
    assert data.pending == ["b.mp4", "torn.mp4"]
    results = read_results(output)
    assert list(results.tables) == ["a.mp4", "b.mp4"]
    assert list(results.failures) == ["torn.mp4"]
    assert results.settings["options"]["inference_steps"] == 50
    assert isinstance(results.total(), AnalysisTable)
    with pytest.raises(ValueError, match="made with other settings: options"):
        predict(items, options={"steps": (0,)})
    with pytest.raises(ValueError, match=r"video torn\.mp4"):
        predict(items, on_broken="raise")
    with pytest.raises(ValueError, match="layer 9 is outside"):
        predict(items, output=tmp_path / "other", options={"layers": (9,)})
    with pytest.raises(ValueError, match="2 videos with 1 names"):
        AnalysisDataModule([items[0], items[0]])
