"""Tracking a folder of videos by `Trainer.predict`: each once, over several processes, resumed after a kill."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import lightning
import numpy as np
import pytest
import torch

from corrdit import Tracks
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.lightning import TrackingModule, VideoDataModule, tracking_report
from corrdit.integrations.lightning.data_modules import EachOnceSampler, Samples
from corrdit.tracking.files import find_videos
from corrdit.video import write_video

PROCESS = pathlib.Path(__file__).with_name("predict_process.py")
NAMES = ["a.mp4", "b.mp4", "broken.mp4", "d.mp4", "sub/c.gif"]
OPTIONS = {"backend": "reference"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no text encoder"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Four videos of 3 to 6 frames and a file that is none, in a folder with a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    random = np.random.default_rng(0)
    for frames, name in enumerate([name for name in NAMES if name != "broken.mp4"], start=3):
        blocks = random.integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
        write_video(folder / name, [np.kron(block, np.ones((16, 16, 1), np.uint8)) for block in blocks])
    (folder / "broken.mp4").write_bytes(b"this is not a video" * 50)
    (folder / "notes.txt").write_text("nor is this")
    return folder


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone("cogvideox-rotary")


def trainer(**options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def module(backbone, output, **options) -> TrackingModule:
    return TrackingModule(backbone, output=output, **{"queries": 3, "pictures": False, "options": OPTIONS} | options)


@pytest.fixture(scope="module")
def results(videos, backbone, tmp_path_factory) -> pathlib.Path:
    """What one process writes."""
    output = tmp_path_factory.mktemp("results")
    torch.manual_seed(0)
    trainer().predict(module(backbone, output), VideoDataModule(videos, output=output), return_predictions=False)
    return output


def same_results(first: pathlib.Path, second: pathlib.Path) -> bool:
    for name in NAMES:
        if name == "broken.mp4":
            continue
        one, other = (Tracks.load(output / name / "tracks.npz") for output in (first, second))
        if not all(torch.equal(getattr(one, field), getattr(other, field)) for field in ("xy", "visible", "score")):
            return False
    return True


def run_processes(*arguments) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "LOCAL_RANK"))}
    return subprocess.run(
        [sys.executable, str(PROCESS), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_videos_are_found_with_their_subfolders(tmp_path, videos):
    assert find_videos(videos) == NAMES
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(b"")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    assert find_videos(tmp_path) == ["frames"]
    with pytest.raises(ValueError, match="is not a folder"):
        find_videos(videos / "a.mp4")
    with pytest.raises(ValueError, match="holds no videos"):
        find_videos(tmp_path / "frames")
    with pytest.raises(ValueError, match=r"no video 'z\.mp4'"):
        VideoDataModule(videos, names=["z.mp4"])


@pytest.mark.parametrize("items, processes", [(0, 1), (1, 2), (5, 2), (7, 3), (2, 4)])
def test_each_item_is_on_exactly_one_process(items, processes):
    dataset = Samples([str(index) for index in range(items)], str)
    samplers = [EachOnceSampler(dataset, processes, rank) for rank in range(processes)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(items))
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    assert max(map(len, samplers)) - min(map(len, samplers)) <= 1


def test_one_process_writes_every_video_and_reports_the_broken_one(videos, results):
    report = tracking_report(results, find_videos(videos))
    assert sorted(report["done"]) == [name for name in NAMES if name != "broken.mp4"]
    assert list(report["failed"]) == ["broken.mp4"]
    assert "not a video" in report["failed"]["broken.mp4"]
    assert report["left"] == {}
    tracks = Tracks.load(results / "sub" / "c.gif" / "tracks.npz")
    assert (tracks.frames, tracks.points) == (6, 9)
    with np.load(results / "a.mp4" / "tracks.npz") as archive:
        np.testing.assert_allclose(archive["queries"][0], [0, 64 / 6, 64 / 6], rtol=1e-6)
        np.testing.assert_allclose(archive["xy"][0], archive["queries"][:, 1:])
    assert [path.name for path in (results / "a.mp4").iterdir()] == ["tracks.npz"]


def test_the_tracks_are_those_of_the_tracker(videos, backbone, results):
    from corrdit import PointTracker
    from corrdit.video import read_video

    with np.load(results / "d.mp4" / "tracks.npz") as archive:
        queries = archive["queries"]
    direct = PointTracker(backbone, **OPTIONS).track(read_video(videos / "d.mp4").frames, queries)
    assert torch.equal(direct.xy, Tracks.load(results / "d.mp4" / "tracks.npz").xy)


def test_a_finished_run_has_nothing_left_and_other_settings_are_refused(videos, backbone, results):
    before = {path: path.stat().st_mtime_ns for path in results.rglob("tracks.npz")}
    data = VideoDataModule(videos, output=results)
    again = trainer().predict(module(backbone, results), data)
    assert data.pending == ["broken.mp4"]
    assert [prediction["name"] for prediction in again] == ["broken.mp4"]
    assert {path: path.stat().st_mtime_ns for path in results.rglob("tracks.npz")} == before
    with pytest.raises(ValueError, match=r"other settings: queries 3 \(now 4\)"):
        trainer().predict(module(backbone, results, queries=4), VideoDataModule(videos, output=results))


def test_other_weights_of_the_same_name_are_refused(videos, results):
    trained = tiny_backbone("cogvideox-rotary")
    with torch.no_grad():
        trained.transformer.proj_out.bias += 1e-3
    with pytest.raises(ValueError, match=r"other settings: weights 'float32 \w+' \(now 'float32 \w+'\); give"):
        trainer().predict(module(trained, results), VideoDataModule(videos, output=results))


def test_pictures_are_drawn_and_leftovers_of_a_killed_run_removed(videos, backbone, tmp_path):
    (tmp_path / "a.mp4" / ".part-old").mkdir(parents=True)
    (tmp_path / "a.mp4" / ".part-old" / "tracks.npz").write_bytes(b"half")
    (tmp_path / "a.mp4" / "failed.json").write_text('{"error": "before"}')
    (prediction,) = trainer().predict(
        module(backbone, tmp_path, pictures=True, max_side=32),
        VideoDataModule(videos, output=tmp_path, names=["a.mp4"]),
    )
    assert (prediction["name"], prediction["frames"], prediction["points"]) == ("a.mp4", 3, 9)
    assert sorted(path.name for path in (tmp_path / "a.mp4").iterdir()) == ["tracks.mp4", "tracks.npz", "tracks.png"]
    # Frames were read at 32 pixels; results are in the file's own 64.
    with np.load(tmp_path / "a.mp4" / "tracks.npz") as archive:
        np.testing.assert_allclose(archive["xy"][0], archive["queries"][:, 1:], rtol=1e-5)
        assert archive["queries"][:, 1:].max() > 50


def test_a_broken_video_stops_the_run_on_request(videos, backbone, tmp_path):
    data = VideoDataModule(videos, output=tmp_path, names=["broken.mp4"])
    with pytest.raises(ValueError, match=r"video broken\.mp4: .*not a video"):
        trainer().predict(module(backbone, tmp_path, on_broken="raise"), data)


def test_a_grid_by_its_name_is_the_one_of_its_number(backbone, tmp_path):
    named, numbered = (module(backbone, tmp_path, queries=queries) for queries in ("grid:3", 3))
    assert named.settings == numbered.settings
    np.testing.assert_array_equal(named._queries(2, 30, 40), numbered._queries(2, 30, 40))


def test_queries_as_an_array_and_as_a_function(videos, backbone, tmp_path):
    table = np.array([[1, 5.0, 6.0], [0, 7.0, 8.0]])
    for name, queries, description in (
        ("array", table, None),
        ("function", lambda frames, height, width: table * [1, width / 64, height / 64], "two points"),
    ):
        data = VideoDataModule(videos, output=tmp_path / name, names=["b.mp4"])
        chosen = module(backbone, tmp_path / name, queries=queries, queries_description=description)
        trainer().predict(chosen, data, return_predictions=False)
        with np.load(tmp_path / name / "b.mp4" / "tracks.npz") as archive:
            np.testing.assert_allclose(archive["queries"], table)
            np.testing.assert_allclose(archive["xy"][1, 0], [5, 6])
    assert json.loads((tmp_path / "function" / "settings.json").read_text())["queries"] == "two points"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"on_broken": "skip"}, "on_broken must be one of"),
        ({"queries": 0}, "make no grid"),
        ({"queries": "gird:4"}, "queries must be a number, grid:N, .* got 'gird:4'"),
        ({"queries": np.zeros((3, 2))}, r"\[points, 3\]"),
        ({"queries": lambda frames, height, width: None}, "queries_description"),
    ],
)
def test_the_module_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TrackingModule("embedded", output=tmp_path, **options)


def test_only_prediction_and_testing_are_offered(backbone, tmp_path):
    with pytest.raises(ValueError, match=r"has no validate step; call Trainer\.predict or Trainer\.test"):
        module(backbone, tmp_path).setup("validate")


def counts(output: pathlib.Path) -> list[int]:
    """Videos each process of the last run did, in ascending order."""
    file = pathlib.Path(f"{output}.counts")
    numbers = sorted(int(line) for line in file.read_text().splitlines())
    file.unlink()
    return numbers


@pytest.mark.slow
def test_two_processes_finish_what_one_began_with_the_same_results(videos, backbone, results, tmp_path):
    output = tmp_path / "output"
    begun = VideoDataModule(videos, output=output, names=["a.mp4", "b.mp4"])
    trainer().predict(module(backbone, output), begun, return_predictions=False)
    done = {path: path.stat().st_mtime_ns for path in output.rglob("tracks.npz")}
    resumed = run_processes(videos, output, 2)
    assert resumed.returncode == 0, resumed.stderr
    assert counts(output) == [1, 2]
    report = tracking_report(output, find_videos(videos))
    assert (len(report["done"]), list(report["failed"]), report["left"]) == (4, ["broken.mp4"], {})
    assert same_results(results, output)
    assert len(done) == 2
    assert all(path.stat().st_mtime_ns == time for path, time in done.items())


@pytest.mark.slow
def test_a_run_killed_in_the_middle_is_resumed(videos, results, tmp_path):
    output = tmp_path / "output"
    killed = run_processes(videos, output, 1, "d.mp4")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.parent.name for path in output.rglob("tracks.npz")) == ["a.mp4", "b.mp4"]
    assert run_processes(videos, output, 1).returncode == 0
    assert counts(output) == [3]
    assert same_results(results, output)
    assert not list(output.rglob(".part-*"))


@pytest.mark.slow
def test_one_of_two_processes_killed_fails_the_run_which_can_be_resumed(videos, results, tmp_path):
    output = tmp_path / "output"
    killed = run_processes(videos, output, 2, "d.mp4")
    assert killed.returncode != 0
    assert not (output / "d.mp4" / "tracks.npz").exists()
    assert run_processes(videos, output, 1).returncode == 0
    assert same_results(results, output)


@pytest.mark.slow
def test_three_processes_give_the_results_of_one_and_more_processes_than_videos_are_no_harm(videos, results, tmp_path):
    output = tmp_path / "output"
    for expected in ([1, 2, 2], [0, 0, 1]):
        run = run_processes(videos, output, 3)
        assert run.returncode == 0, run.stderr
        assert same_results(results, output)
        # In the second run only the broken video is left.
        assert counts(output) == expected
