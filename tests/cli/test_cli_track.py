"""`corrdit track`: what it writes, and that it writes nothing when something is wrong."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest

import corrdit.visualization
from corrdit.cli import main
from corrdit.tracking import Tracks, rerun_file
from corrdit.video import probe_video, read_video, write_video
from corrdit.visualization import TrackStyle

Refused = Callable[..., str]
HEIGHT, WIDTH, FRAMES = 48, 64, 6
TRACKS = ["tracks.json", "tracks.mp4", "tracks.npz", "tracks.png"]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """A folder to which nothing may be added."""
    (tmp_path / "points.csv").write_text("0,10,10\n")
    before = snapshot(tmp_path)
    yield tmp_path
    assert {name for name in snapshot(tmp_path) if not name.startswith("given")} == set(before)


def test_writes_tracks_video_and_sheet(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    output = tmp_path / "new" / "results"
    assert main(["track", str(clip), "--output", str(output), "--points", "grid:4"]) == 0
    assert sorted(path.name for path in output.iterdir()) == TRACKS
    assert [path.name for path in output.parent.iterdir()] == ["results"]
    with np.load(output / "tracks.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "xy": ((FRAMES, 16, 2), "float32"),
        "visible": ((FRAMES, 16), "bool"),
        "score": ((FRAMES, 16), "float32"),
        "queries": ((16, 3), "float32"),
    }
    np.testing.assert_array_equal(arrays["queries"][0], (0, WIDTH / 8, HEIGHT / 8))
    np.testing.assert_array_equal(arrays["xy"][3] - arrays["xy"][0], np.tile((6, 0), (16, 1)))
    assert Tracks.load(output / "tracks.npz").points == 16
    info = probe_video(output / "tracks.mp4")
    assert (info.frames, info.fps) == (FRAMES, 10)
    sheet = imageio.imread(output / "tracks.png")
    assert sheet.ndim == 3
    assert sheet.std() > 10


def test_another_run_takes_another_folder(
    clip: Path, tmp_path: Path, drifting_tracker: Any, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["track", str(clip), "--output", str(output), "--points", "grid:4"]
    assert main(command) == 0
    before = snapshot(output)
    for changed, message in ((["--points", "grid:2"], "points 'grid:4'"), (["--start", "1"], "start 0 (now 1)")):
        assert message in refused(*command, *changed)
    assert snapshot(output) == before
    (output / "tracks.mp4").unlink()
    assert main(command) == 0, "the same command makes them anew"
    assert snapshot(output) == before


def test_prints_what_it_did(
    clip: Path, tmp_path: Path, drifting_tracker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", str(clip), "--output", str(tmp_path), "--points", "grid:2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("4 points through 6 frames of 48 x 64 in ")
    assert str(tmp_path / "tracks.mp4") in out
    assert err.startswith(
        "corrdit track: note: the embedded model has seen generated videos only; on a real one expect"
    )
    assert "take --model cogvideox-2b --device cuda" in err
    assert main(["track", str(clip), "--output", str(tmp_path / "mine"), "--points", "grid:2", "--model", "mine"]) == 0
    assert capsys.readouterr().err == ""


def test_points_of_a_file_start_and_length(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    points = tmp_path / "points.csv"
    points.write_text("x,y,frame\n10.5,20,2\n64,48,0\n")
    arguments = ["--points", str(points), "--start", "1", "--max-frames", "4"]
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert drifting_tracker.asked["shape"] == (4, HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(drifting_tracker.asked["queries"], [(2, 10.5, 20), (0, 64, 48)])
    whole = read_video(clip).frames
    assert drifting_tracker.asked["first"] == whole[1:2].mean()
    assert probe_video(tmp_path / "out" / "tracks.mp4").frames == 4


def test_shrunk_frames_give_tracks_in_the_pixels_of_the_file(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    points = tmp_path / "points.csv"
    points.write_text("1,33.25,11\n0,64,48\n")
    arguments = ["--points", str(points), "--max-side", "32"]
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), *arguments]) == 0
    assert drifting_tracker.asked["shape"] == (FRAMES, 24, 32, 3)
    np.testing.assert_allclose(drifting_tracker.asked["queries"], [(1, 16.625, 5.5), (0, 32, 24)])
    tracks = Tracks.load(tmp_path / "out" / "tracks.npz")
    np.testing.assert_array_equal(tracks.xy[1, 0], (33.25, 11))
    np.testing.assert_allclose(tracks.xy[3, 0], (33.25 + 2 * 2 * 2, 11))


def test_options_reach_the_tracker(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    config = tmp_path / "given.yaml"
    config.write_text("preset: published\nlayer: 3\nresize_first: [32, 48]\n")
    arguments = ["--config", str(config), "--average-overlap", "false", "--step", "-2", "--head-weights", "[1,0]"]
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--model", "mine", *arguments]) == 0
    asked = {name: drifting_tracker.asked[name] for name in ("model", "preset", "layer", "step", "average_overlap")}
    assert asked == {"model": "mine", "preset": "published", "layer": 3, "step": -2, "average_overlap": False}
    assert tuple(drifting_tracker.asked["resize_first"]) == (32, 48)
    assert drifting_tracker.asked["head_weights"] == [1.0, 0.0]
    assert "refine" not in drifting_tracker.asked, "an option that was not given is left to the preset"


def test_command_line_offers_exactly_the_options_of_the_tracker() -> None:
    import dataclasses
    import typing

    from corrdit.cli import tracker_options
    from corrdit.tracking.options import PRESETS, TrackerOptions

    types = typing.get_type_hints(TrackerOptions)
    sides = ("height", "width")  # of --size
    assert [*tracker_options._OPTIONS] == [
        field.name for field in dataclasses.fields(TrackerOptions) if field.name not in sides
    ]
    for name, (kind, _) in tracker_options._OPTIONS.items():
        wanted = types[name] if type(None) not in typing.get_args(types[name]) else typing.get_args(types[name])[0]
        assert kind == wanted or name == "head_weights", name
    assert set(PRESETS) == {"default", "published"}


def test_a_stopped_run_goes_on_block_by_block(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from corrdit.integrations.diffusers.backbones.base import Backbone

    forward, passes, allowed = Backbone.forward, [0], [2]

    def counted(self: Backbone, *arguments: Any, **keywords: Any) -> Any:
        passes[0] += 1
        if passes[0] > allowed[0]:
            raise KeyboardInterrupt
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(Backbone, "forward", counted)
    output = tmp_path / "results"
    command = ["track", str(clip), "--output", str(output), "--points", "grid:2", "--crops", "[]"]
    command += ["--frames-per-block", "2"]
    assert main(command) == 130
    assert [path.name for path in output.iterdir()] == [".parts"]
    passes[0], allowed[0] = 0, 100
    assert main(command) == 0
    assert passes[0] == 1  # two of the three blocks were there
    assert sorted(path.name for path in output.iterdir()) == TRACKS
    assert main([*command[:3], str(tmp_path / "at once"), *command[4:]]) == 0
    assert (output / "tracks.npz").read_bytes() == (tmp_path / "at once" / "tracks.npz").read_bytes()


def test_an_existing_folder_keeps_its_other_files(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tracks.png").write_text("old")
    assert main(["track", str(clip), "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", *TRACKS]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert imageio.imread(tmp_path / "tracks.png").ndim == 3


@pytest.mark.usefixtures("drifting_tracker")
class TestBadVideo:
    @pytest.mark.parametrize(
        "name, content, expected",
        [
            ("missing.mp4", None, "there is no file or folder"),
            ("empty.mp4", b"", "is not a video that can be read"),
            ("text.mp4", b"hello\n" * 99, "is not a video that can be read"),
        ],
    )
    def test_not_a_video(
        self, workplace: Path, refused: Refused, name: str, content: bytes | None, expected: str
    ) -> None:
        (workplace / "given").mkdir()
        if content is not None:
            (workplace / "given" / name).write_bytes(content)
        line = refused("track", workplace / "given" / name, "--output", workplace / "out")
        assert expected in line
        assert name in line
        assert "accepted are mp4, mov, webm, mkv, avi and gif files and folders of png or jpg frames" in line

    def test_zero_frames(self, workplace: Path, refused: Refused) -> None:
        (workplace / "given").mkdir()
        assert "holds no png or jpg frames" in refused("track", workplace / "given", "--output", workplace / "out")

    def test_one_frame(self, workplace: Path, refused: Refused) -> None:
        write_video(workplace / "given.mp4", np.zeros((1, 32, 32, 3), np.uint8))
        imageio.imwrite(workplace / "given.png", np.zeros((32, 32, 3), np.uint8))
        line = refused("track", workplace / "given.mp4", "--output", workplace / "out")
        assert "given.mp4 gives 1 frame; at least 2 are needed" in line
        line = refused("track", workplace / "given.png", "--output", workplace / "out")
        assert "is a single picture, one frame" in line

    def test_processes_for_one_video(self, workplace: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", workplace / "out", "--processes", "2")
        assert "--processes 2 shares out the videos of a folder" in line

    def test_points_for_every_pixel(self, workplace: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", workplace / "out", "--dense", "8", "--points", "grid:4")
        assert "--dense 8 follows pixels in place of --points grid:4; leave one of them out" in line

    def test_start_beyond_the_end(self, workplace: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", workplace / "out", "--start", "6")
        assert "gives 0 frames from start=6" in line


@pytest.mark.usefixtures("drifting_tracker")
class TestBadPoints:
    @pytest.mark.parametrize(
        "content, expected",
        [
            ("", "is empty"),
            ("\n\n", "is empty"),
            ("frame,x,y\n", "has a header and no points"),
            ("frame,x\n0,1\n", "has the columns frame,x;"),
            ("time,x,y\n0,1,2\n", "has the columns time,x,y;"),
            ("0,1\n", "line 1 has 2 columns"),
            ("0,1,2\n0,1,2,3\n", "line 2 has 4 columns"),
            ("0,nan,2\n", "line 1: x is 'nan', not a finite number"),
            ("0,1,inf\n", "line 1: y is 'inf', not a finite number"),
            ("frame,x,y\n0,1,two\n", "line 2: y is 'two', not a finite number"),
            ("0,1,\n", "line 1: y is '', not a finite number"),
            ("6,1,1\n", "frame 6 is not in the video, which has the frames 0 to 5"),
            ("-1,1,1\n", "frame -1 is not in the video"),
            ("0.5,1,1\n", "frame 0.5 is not a whole number"),
            ("0,64.5,1\n", "the point (64.5, 1) is outside the frame; x goes from 0 to 64, y from 0 to 48"),
            ("0,1,-0.1\n", "the point (1, -0.1) is outside the frame"),
            (b"\xff\xfe\x00\x01", "is not a CSV text file"),
        ],
    )
    def test_bad_file(self, workplace: Path, clip: Path, refused: Refused, content: str | bytes, expected: str) -> None:
        given = workplace / "given.csv"
        given.write_bytes(content if isinstance(content, bytes) else content.encode())
        line = refused("track", clip, "--output", workplace / "out", "--points", given)
        assert expected in line
        assert "given.csv" in line

    @pytest.mark.parametrize(
        "spec, expected",
        [
            ("grid:0", "is not a grid of 1 to 512 points a side"),
            ("grid:", "is not a grid"),
            ("grid:4x4", "is not a grid"),
            ("grid:1000", "is not a grid"),
            ("nowhere.csv", "there is no such file; accepted are grid:N"),
        ],
    )
    def test_bad_spec(self, workplace: Path, clip: Path, refused: Refused, spec: str, expected: str) -> None:
        assert expected in refused("track", clip, "--output", workplace / "out", "--points", spec)

    def test_headers_comments_and_marks_are_understood(self, tmp_path: Path, clip: Path, drifting_tracker: Any) -> None:
        points = tmp_path / "points.csv"
        points.write_bytes(b"\xef\xbb\xbf# picked by hand\r\nFrame, X, Y\r\n\r\n3, 1.5, 2\r\n")
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--points", str(points)]) == 0
        np.testing.assert_array_equal(drifting_tracker.asked["queries"], [(3, 1.5, 2)])

    @pytest.mark.usefixtures("drifting_tracker")
    def test_further_columns_are_carried_through(self, tmp_path: Path, clip: Path) -> None:
        points = tmp_path / "points.csv"
        points.write_text("label,x,frame,y,part,weight\nleft ear,1.5,3,2,7,0.5\nnose,4,0,5,8,1\n")
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--points", str(points)]) == 0
        with np.load(tmp_path / "out" / "tracks.npz") as held:
            np.testing.assert_array_equal(held["queries"], [(3, 1.5, 2), (0, 4, 5)])
            assert held["label"].tolist() == ["left ear", "nose"]
            assert held["part"].dtype.kind == "i"
            assert held["part"].tolist() == [7, 8]
            assert held["weight"].tolist() == [0.5, 1.0]

    @pytest.mark.usefixtures("drifting_tracker")
    def test_labels_that_look_like_numbers_stay_as_they_are(self, tmp_path: Path, clip: Path) -> None:
        points = tmp_path / "points.csv"
        cells = {
            "code": ["007", "12"], "long": ["99999999999999999999", "1"], "exact": ["9007199254740993", "1.5"],
            "spaced": ["1_000", "2"], "file": ["a", "b"], "allow_pickle": ["1", "-2"], "half": ["0.5", "1e3"],
        }  # fmt: skip
        rows = zip(*cells.values(), strict=True)
        points.write_text(
            "\n".join([f"frame,x,y,{','.join(cells)}", *(f"0,1,{i},{','.join(row)}" for i, row in enumerate(rows))])
        )
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--points", str(points)]) == 0
        with np.load(tmp_path / "out" / "tracks.npz", allow_pickle=False) as held:
            for name in ("code", "long", "exact", "spaced", "file"):
                assert held[name].tolist() == cells[name]
            assert held["allow_pickle"].tolist() == [1, -2]
            assert held["half"].tolist() == [0.5, 1000.0]

    def test_results_do_not_go_among_the_videos(self, tmp_path: Path, clip: Path, refused: Refused) -> None:
        videos = tmp_path / "videos"
        videos.mkdir()
        shutil.copy(clip, videos)
        assert "is VIDEO itself; give the results another folder" in refused("track", videos, "--output", videos)
        assert [path.name for path in videos.iterdir()] == [clip.name]

    @pytest.mark.usefixtures("drifting_tracker")
    def test_coordinates_with_underscores_are_refused(self, workplace: Path, clip: Path, refused: Refused) -> None:
        given = workplace / "given.csv"
        given.write_text("frame,x,y\n0,1_0,1\n")
        line = refused("track", clip, "--output", workplace / "out", "--points", given)
        assert "line 2: x is '1_0', not a finite number" in line

    @pytest.mark.usefixtures("drifting_tracker")
    def test_names_of_results_are_no_names_of_columns(self, workplace: Path, clip: Path, refused: Refused) -> None:
        given = workplace / "given.csv"
        given.write_text("frame,x,y,score\n0,1,1,3\n")
        line = refused("track", clip, "--output", workplace / "out", "--points", given)
        assert "has a column named 'score', as the results name their own; call it otherwise" in line

    @pytest.mark.usefixtures("drifting_tracker")
    def test_look_of_the_pictures(self, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[TrackStyle] = []
        monkeypatch.setattr(
            corrdit.visualization, "write_track_pictures", lambda *given, style, **further: drawn.append(style)
        )
        look = ["--trail", "3", "--fade", "0.2", "--radius", "4.5", "--hide-hidden"]
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), *look]) == 0
        assert drawn == [TrackStyle(trail=3, fade=0.2, radius=4.5, hidden=False)]


RERUN_ROW = r"│ row_\w+ +┆ (\d+) +┆ [^┆]+┆ \[([^]]*)\] +┆ (\[[^]]*\]) +┆ [^┆]+┆ \[([^]]*)\] +┆ (\[.*?\]) +│"
"""Of `rerun rrd print`: frame, time, numbers, scores, colours, labels and places of the points."""


@pytest.mark.slow
def test_a_recording_for_the_rerun_viewer(tmp_path: Path, clip: Path, drifting_tracker: Any) -> None:
    pytest.importorskip("rerun")
    points = tmp_path / "points.csv"
    points.write_text("label,frame,x,y\nnose,0,4,5\near,1,9,9\n")
    call = ["track", str(clip), "--output", str(tmp_path / "out"), "--points", str(points), "--rerun"]
    assert main(call) == 0
    recording, tracks = tmp_path / "out" / "tracks.rrd", Tracks.load(tmp_path / "out" / "tracks.npz")
    viewer = [sys.executable, "-m", "rerun", "rrd"]
    subprocess.run([*viewer, "verify", recording], check=True)
    found = {"visible": np.full(tracks.xy.shape, np.nan), "hidden": np.full(tracks.xy.shape, np.nan)}
    for name, xy in found.items():
        command = [*viewer, "print", "-vvv", "--entity", f"/video/{name}", recording]
        rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for frame, numbers, scores, labels, places in re.findall(RERUN_ROW, rows):
            chosen = [int(number) for number in numbers.split(", ") if number]
            xy[int(frame), chosen] = np.reshape(json.loads(places), (-1, 2))
            assert json.loads(scores) == pytest.approx(tracks.score[int(frame), chosen].tolist())
            assert labels == ", ".join(["nose", "ear"][number] for number in chosen)
    visible = tracks.visible.numpy()[..., None]
    np.testing.assert_allclose(found["visible"], np.where(visible, tracks.xy, np.nan), rtol=1e-6)
    np.testing.assert_allclose(found["hidden"], np.where(visible, np.nan, tracks.xy), rtol=1e-6)


def test_a_recording_without_its_package_or_its_points(
    tmp_path: Path, clip: Path, drifting_tracker: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerun_file, "find_spec", lambda name: None)
    assert 'pip install ".[rerun]" in a checkout' in refused("track", clip, "--output", tmp_path / "out", "--rerun")
    monkeypatch.setattr(rerun_file, "find_spec", lambda name: True)
    line = refused("track", clip, "--output", tmp_path / "out", "--rerun", "--dense", "4")
    assert "--rerun shows points and --dense follows every pixel" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("drifting_tracker")
class TestBadOptions:
    @pytest.mark.parametrize(
        "arguments, expected",
        [
            (["--layer", "last"], "layer"),
            (
                ["--preset", "best"],
                "--preset best is not understood; accepted are default, published, ditracker, heft or a preset.json",
            ),
            (["--colour", "red"], "unrecognized arguments: --colour"),
            (["--config", "nowhere.yaml"], "nowhere.yaml"),
            (["--max-side", "0"], "max_side=0"),
            (["--max-frames", "0"], "max_frames=0"),
            (["--trail", "-1"], "trail=-1"),
            (["--fade", "2"], "fade=2.0"),
            (["--radius", "0"], "radius=0.0"),
            (["--device", "toaster"], "--device toaster is not a device; accepted are cpu"),
            (["--device", "cuda:99"], "--device cuda:99 is not usable here; accepted are cpu"),
        ],
    )
    def test_bad_value(
        self, workplace: Path, clip: Path, refused: Refused, arguments: list[str], expected: str
    ) -> None:
        assert expected in refused("track", clip, "--output", workplace / "out", *arguments)

    def test_missing_arguments(self, refused: Refused, clip: Path) -> None:
        assert "output" in refused("track", clip)
        assert "video" in refused("track")

    def test_output_is_a_file(self, workplace: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", workplace / "points.csv")
        assert "points.csv is a file; give a folder" in line
        line = refused("track", clip, "--output", workplace / "points.csv" / "out")
        assert "cannot write into the output folder" in line
        assert "Not a directory" in line


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        status = subprocess.run(command, capture_output=True, check=False).returncode
    except FileNotFoundError:
        status = 1
    if status:
        pytest.skip("mounting a small file system needs to be root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "full", "size=16k")


@pytest.fixture
def write_protected(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "protected", "ro,size=64k")


@pytest.mark.usefixtures("drifting_tracker")
class TestBadDisk:
    def test_full_disk(self, full_disk: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", full_disk / "deep" / "out")
        assert f"the disk of the output folder {full_disk / 'deep' / 'out'} is full; nothing was written there" in line
        assert list(full_disk.iterdir()) == []
        (full_disk / "tracks.npz").write_text("old")
        line = refused("track", clip, "--output", full_disk)
        assert "is full" in line
        assert snapshot(full_disk) == {"tracks.npz": b"old"}

    def test_write_protected(self, write_protected: Path, clip: Path, refused: Refused) -> None:
        line = refused("track", clip, "--output", write_protected / "out")
        assert "cannot write into the output folder" in line
        assert "Read-only file system" in line

    @pytest.mark.parametrize("step", ["save", "write_track_pictures"])
    def test_disk_that_fills_half_way(
        self, workplace: Path, clip: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        owner = {"save": "corrdit.tracking.tracks.Tracks.save"}.get(step, f"corrdit.visualization.{step}")
        monkeypatch.setattr(owner, full)
        assert "out is full; nothing was written" in refused("track", clip, "--output", workplace / "out")

    def test_an_existing_result_survives(
        self, tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--points", "grid:2"]) == 0
        capsys.readouterr()
        before = snapshot(tmp_path)

        def stopped(*arguments: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("corrdit.visualization.tracks.contact_sheet", stopped)
        assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--points", "grid:2"]) == 130
        assert snapshot(tmp_path) == before
        assert capsys.readouterr().err == "corrdit track: stopped by Ctrl-C; nothing unfinished was left behind\n"
