"""`corrdit evaluate`: tables, published settings, several processes, and going on after a kill."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from corrdit.cli import evaluate, main
from corrdit.cli.tracker_options import given_tracker_options
from corrdit.evaluation import chosen_trackers
from corrdit.metrics.tapvid import METRIC_NAMES

PROCESS = pathlib.Path(__file__).with_name("evaluate_process.py")
COMMAND = pathlib.Path(sys.executable).with_name("corrdit")
TABLES = ("table.json", "table.csv", "videos.csv", "splits.csv")
ON_CPU = ["--trainer.accelerator", "cpu"]

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def run(*arguments, killed_at: str | None = None) -> subprocess.CompletedProcess:
    """The command in processes of its own, one of which dies at a video if that is asked for."""
    lightning_s = ("PYTEST", "LOCAL_RANK", "MASTER_", "NODE_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(lightning_s)}
    begin = (COMMAND,) if killed_at is None else (sys.executable, PROCESS)
    return subprocess.run(
        [str(part) for part in (*begin, "evaluate", *arguments, *ON_CPU)],
        env=environment | {"OMP_NUM_THREADS": "1", "KILLED_AT": killed_at or ""},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def expected(kinetics, tmp_path_factory) -> pathlib.Path:
    """What one process that nobody stops writes."""
    output = tmp_path_factory.mktemp("expected")
    assert main(["evaluate", "--data", str(kinetics), "--output", str(output), "--trackers", "still", *ON_CPU]) == 0
    return output


def same_tables(first: pathlib.Path, second: pathlib.Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in TABLES)


def test_the_table_is_printed_and_written(expected, kinetics, capsys):
    arguments = ["evaluate", "--data", str(kinetics), "--output", str(expected), "--trackers", "still", *ON_CPU]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    row = json.loads((expected / "table.json").read_text())["trackers"][0]
    assert (row["videos"], row["videos_without_visible_points"]) == (4, ["0002_of_0003/0001"])
    line = next(line for line in said.splitlines() if line.strip().startswith("still"))
    shown = ["average_jaccard", "average_pts_within_thresh", "occlusion_accuracy"]
    shown += [f"pts_within_{threshold}" for threshold in (1, 2, 4, 8, 16)]
    without_intervals = re.sub(r"\[[^]]*\]", "", line)
    assert without_intervals.split()[:10] == ["still", "4", *(f"{100 * row[name]:.1f}" for name in shown)]
    assert "[{:.1f}, {:.1f}]".format(*(100 * end for end in row["intervals"]["average_jaccard"])) in line
    assert "Percent, means over videos [95 % interval]" in said
    assert line.endswith("1 without visible points")
    assert "0 of 5 videos evaluated now" in said
    (written,) = csv.DictReader((expected / "table.csv").open())
    assert set(METRIC_NAMES) < set(written)


def parsed(*arguments: str):
    parser = ArgumentParser(exit_on_error=False)
    evaluate.add_arguments(parser)
    return parser.parse_args([*arguments, "--data", "d", "--output", "o"])


@pytest.mark.parametrize(
    "model, layer, step, steps, heads, head_dim",
    [
        ("cogvideox-2b", 17, 49, 50, 30, 64),
        ("cogvideox-5b", 17, 49, 50, 48, 64),
        ("hunyuanvideo", 16, 29, 30, 24, 128),
    ],
)
@pytest.mark.parametrize("data", ["davis", "kinetics"])
def test_published_settings_by_name(model, layer, step, steps, heads, head_dim, data):
    arguments = parsed("--config", f"{model}-{data}", "--trainer.devices", "8", "--trainer.num_nodes", "4")
    assert (arguments.model, arguments.dtype, arguments.mode) == (model, "bfloat16", "frame_0")
    assert (arguments["trainer.devices"], arguments["trainer.num_nodes"]) == (8, 4)
    assert arguments.end == (200 if data == "kinetics" else None)
    (choice,) = chosen_trackers(evaluate.plain(arguments.trackers), given_tracker_options(arguments))
    assert choice.kind == "released"
    assert choice.options == {
        "layer": layer,
        "step": step,
        "inference_steps": steps,
        "noise": False,
        "temperature": pytest.approx((head_dim / heads) ** 0.5, rel=1e-12),
        "resize_first": [256, 256],
        "height": 480,
        "width": 720,
        "frames_per_chunk": 13,
        "schedule": "interleaved",
        "average_overlap": True,
    }


def test_the_published_layers_are_those_of_the_presets():
    from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS

    for name, model in PUBLISHED_MODELS.items():
        (choice,) = chosen_trackers(evaluate.plain(parsed("--config", f"{name}-davis").trackers))
        preset = model.preset.reading
        assert choice.options["layer"] == preset.layer
        assert choice.options["inference_steps"] == preset.inference_steps
        assert choice.options["step"] == preset.step % preset.inference_steps
        assert (choice.options["height"], choice.options["width"]) == (preset.height, preset.width)


def test_trackers_by_label_are_given_as_yaml():
    arguments = parsed("--trackers", "{whole: {kind: ours, refine: 0}, still: null}", "--layer", "1")
    choices = chosen_trackers(evaluate.plain(arguments.trackers), given_tracker_options(arguments))
    assert [(choice.label, choice.kind, choice.options) for choice in choices] == [
        ("whole", "ours", {"layer": 1, "refine": 0}),
        ("still", "still", {}),
    ]


def test_options_after_the_setting_change_it_and_a_file_is_read(tmp_path):
    assert parsed("--config", "hunyuanvideo-davis", "--mode", "strided").mode == "strided"
    file = tmp_path / "mine.yaml"
    file.write_text("trackers: [still, patches]\nmax_frames: 9\n")
    arguments = parsed("--config", str(file))
    assert (arguments.trackers, arguments.max_frames) == (["still", "patches"], 9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "ABSENT"], "ABSENT does not exist"),
        (["--trackers", "best"], "unknown tracker 'best'; accepted are ours, released"),
        (["--trackers", "still", "--mode", "last"], "mode must be one of"),
        (["--trackers", "ours", "--layer", "99"], "layer must be from 0 to"),
        (["--trackers", "still", "--trainer.devices", "none"], "--trainer.devices none"),
        (["--trackers", "still", "--start", "77"], "no video from number 77"),
        (["--config", "cogvideox-9b-davis"], "settings are cogvideox-2b-davis, cogvideox-2b-kinetics"),
        (["--query-stride", "0"], "stride must be"),
        (["--model", "no such model"], "unknown model 'no such model'"),
    ],
)
def test_bad_input_is_one_line(davis, tmp_path, capsys, arguments, message):
    given = ["evaluate", "--data", str(davis), "--output", str(tmp_path / "out"), *ON_CPU, *arguments]
    capsys.readouterr()
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out" / "settings.json").exists()


def test_a_broken_file_stops_or_is_skipped(videos, tmp_path, capsys):
    from corrdit.data import write_tapvid_shards

    write_tapvid_shards(tmp_path / "set", videos[:3], count=3, shards=3)
    shard = tmp_path / "set" / "0000_of_0003.pkl"
    shard.write_bytes(shard.read_bytes()[:300])
    arguments = ["evaluate", "--data", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--trackers", "still"]
    assert main([*arguments, *ON_CPU]) == 2
    assert "video 0000_of_0003.pkl could not be evaluated" in capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, *ON_CPU, "--skip-broken"]) == 0
    said = capsys.readouterr()
    assert "still without video 0000_of_0003.pkl: " in said.err
    assert "1 broken" in said.out
    assert "2 of 3 videos evaluated now" in said.out


def test_a_killed_run_goes_on_over_two_processes_with_the_same_tables(kinetics, expected, tmp_path):
    arguments = ["--data", kinetics, "--output", tmp_path, "--trackers", "still"]
    killed = run(*arguments, killed_at="0001_of_0003/0001")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").rglob("*.json")}
    assert len(done) == 2
    assert not (tmp_path / "table.json").exists()
    resumed = run(*arguments, "--trainer.devices", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert "3 of 5 videos evaluated now" in resumed.stdout
    assert same_tables(tmp_path, expected)
    assert {path: path.stat().st_mtime_ns for path in done} == done


@pytest.mark.slow
def test_three_processes_give_the_tables_of_one(kinetics, expected, tmp_path):
    finished = run("--data", kinetics, "--output", tmp_path, "--trackers", "still", "--trainer.devices", 3)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("videos evaluated now") == 1
    assert same_tables(tmp_path, expected)


@pytest.mark.slow
def test_one_of_two_processes_killed_ends_the_run_which_goes_on(kinetics, expected, tmp_path):
    arguments = ["--data", kinetics, "--output", tmp_path, "--trackers", "still"]
    killed = run(*arguments, "--trainer.devices", 2, killed_at="0002_of_0003/0001")
    assert killed.returncode != 0
    assert not (tmp_path / "table.json").exists()
    assert run(*arguments).returncode == 0
    assert same_tables(tmp_path, expected)


@pytest.mark.slow
def test_a_broken_video_on_another_process_is_said_once(videos, tmp_path):
    from corrdit.data import write_tapvid_shards

    write_tapvid_shards(tmp_path / "set", videos[:3], count=3, shards=3)
    shard = tmp_path / "set" / "0002_of_0003.pkl"
    shard.write_bytes(shard.read_bytes()[:300])
    arguments = ["--data", tmp_path / "set", "--output", tmp_path / "out", "--trackers", "still"]
    stopped = run(*arguments, "--trainer.devices", 2)
    assert stopped.returncode == 2, stopped.stderr
    assert stopped.stderr.count("0002_of_0003.pkl could not be evaluated") == 1
    assert "Traceback" not in stopped.stderr


@pytest.mark.slow
def test_the_embedded_model_beside_all_that_needs_no_model(world, tmp_path):
    """Generated videos to a table of baselines in two commands."""
    options = ["--trackers", "ours,released,patches,still", "--queries-at-once", 6, "--pictures", 1]
    finished = run("--data", world, "--output", tmp_path, *options)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["trackers"]
    assert [row["tracker"] for row in rows] == ["ours", "released", "patches", "still"]
    assert all(row["videos"] == 3 for row in rows)
    assert (tmp_path / "pictures" / "ours" / "0000.mp4").is_file()
