"""The tracks dataclass: validation, storing and restoring."""

from __future__ import annotations

import csv
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from corrdit import Tracks
from corrdit.files import written_beside
from corrdit.video import read_video
from corrdit.visualization import TrackStyle, draw_tracks


def some_tracks(frames: int = 4, points: int = 3) -> Tracks:
    random = np.random.default_rng(0)
    return Tracks(
        random.uniform(0, 100, (frames, points, 2)),
        random.random((frames, points)) > 0.5,
        random.random((frames, points)),
    )


def test_arrays_become_cpu_tensors_of_the_documented_types():
    tracks = some_tracks()
    assert (tracks.xy.dtype, tracks.visible.dtype, tracks.score.dtype) == (torch.float32, torch.bool, torch.float32)
    assert (tracks.frames, tracks.points) == (4, 3)
    with_gradient = Tracks(
        torch.zeros(2, 1, 2, requires_grad=True), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1)
    )
    assert not with_gradient.xy.requires_grad


@pytest.mark.parametrize(
    "xy, visible, score, message",
    [
        (np.zeros((4, 3)), np.ones((4, 3), bool), np.ones((4, 3)), r"\[frames, points, 2\]"),
        (np.zeros((0, 3, 2)), np.ones((0, 3), bool), np.ones((0, 3)), "at least one frame"),
        (np.zeros((4, 3, 2)), np.ones((3, 4), bool), np.ones((4, 3)), r"visible must have shape .* = \[4, 3\]"),
        (np.zeros((4, 3, 2)), np.ones((4, 3)), np.ones((4, 3)), "visible must be boolean"),
        (np.zeros((4, 3, 2)), np.ones((4, 3), bool), np.ones((4, 2)), r"score must have shape .* got \[4, 2\]"),
        (np.full((4, 3, 2), np.nan), np.ones((4, 3), bool), np.ones((4, 3)), "xy holds 24 numbers"),
        (np.zeros((4, 3, 2)), np.ones((4, 3), bool), np.full((4, 3), np.inf), "score holds 12 numbers"),
        ("points", np.ones((4, 3), bool), np.ones((4, 3)), "xy must be an array of numbers"),
    ],
)
def test_refuses_what_does_not_fit(xy, visible, score, message):
    with pytest.raises(ValueError, match=message):
        Tracks(xy, visible, score)


def test_save_and_load_give_the_same_back(tmp_path):
    tracks = some_tracks()
    queries = np.array([[0, 1.5, 2.5], [1, 3, 4], [2, 5, 6]], np.float32)
    path = tmp_path / "tracks.npz"
    tracks.save(path, queries=queries)
    again = Tracks.load(path)
    assert torch.equal(again.xy, tracks.xy)
    assert torch.equal(again.visible, tracks.visible)
    assert torch.equal(again.score, tracks.score)
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["queries"], queries)
        assert {name: archive[name].dtype.name for name in ("xy", "visible", "score")} == {
            "xy": "float32",
            "visible": "bool",
            "score": "float32",
        }
    assert [entry.name for entry in tmp_path.iterdir()] == ["tracks.npz"]


def test_save_refuses_queries_of_another_shape_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"\[3, 3\], got \[2, 3\]"):
        some_tracks().save(tmp_path / "tracks.npz", queries=np.zeros((2, 3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 truncated"])
def test_load_says_what_a_tracks_file_is(tmp_path, content):
    path = tmp_path / "tracks.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a tracks file"):
        Tracks.load(path)


def test_load_names_missing_arrays_and_refuses_pickled_ones(tmp_path):
    np.savez(tmp_path / "other.npz", xy=np.zeros((1, 1, 2)))
    with pytest.raises(ValueError, match="lacks visible, score and holds xy"):
        Tracks.load(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", xy=np.array([{}], object), visible=np.ones(1), score=np.ones(1))
    with pytest.raises(ValueError, match="not a tracks file"):
        Tracks.load(tmp_path / "objects.npz")
    with pytest.raises(FileNotFoundError):
        Tracks.load(tmp_path / "absent.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def half_written():
        with written_beside(path, "w") as file:
            file.write("new, but not all of it")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        half_written()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.txt"]


def test_writing_into_a_missing_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        some_tracks().save(tmp_path / "absent" / "tracks.npz")


def test_save_writes_a_table_by_the_ending(tmp_path):
    tracks = some_tracks()
    tracks.save(tmp_path / "tracks.csv", columns={"label": ["ear", "nose", "=tail"]})
    rows = list(csv.DictReader((tmp_path / "tracks.csv").open()))
    assert list(rows[0]) == ["frame", "point", "x", "y", "visible", "score", "label"]
    assert len(rows) == tracks.frames * tracks.points
    for row in rows:
        place = int(row["frame"]), int(row["point"])
        assert [float(row["x"]), float(row["y"])] == pytest.approx(tracks.xy[place].tolist(), abs=1e-3)
        assert bool(int(row["visible"])) == bool(tracks.visible[place])
        assert row["label"] == ["ear", "nose", "'=tail"][place[1]]


def test_drawings_are_those_of_draw_tracks(tmp_path):
    tracks = some_tracks()
    video = np.random.default_rng(0).integers(0, 255, (tracks.frames, 24, 32, 3), dtype=np.uint8)
    style = TrackStyle(trail=2)
    drawn = tracks.draw(list(video), style=style)
    np.testing.assert_array_equal(drawn, draw_tracks(video, tracks, style=style))
    tracks.save(tmp_path / "tracks.gif", video=video, fps=5, style=style)
    assert read_video(tmp_path / "tracks.gif").frames.shape == drawn.shape
    with pytest.raises(ValueError, match=r"the video has 2 frames, the tracks have 4"):
        tracks.save(tmp_path / "other.mp4", video=video[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["tracks.gif"]


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tracks.txt", {}, r"tracks.txt does not end in .npz, .csv, .mp4, .mov, .gif"),
        ("tracks.mp4", {}, "shows tracks over their video; give it as video="),
        ("tracks.npz", {"columns": {"label": ["one"]}}, r"column 'label' has shape \[1\]; accepted is \[points\]"),
        ("tracks.npz", {"columns": {"score": [1, 2, 3]}}, "under a name that the file does not use itself"),
    ],
)
def test_save_refuses_what_it_cannot_write(tmp_path, name, given, message):
    with pytest.raises(ValueError, match=message):
        some_tracks().save(tmp_path / name, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_moving_tracks():
    tracks = some_tracks()
    assert repr(tracks) == "Tracks(3 points through 4 frames, 67 % visible)"
    page = ElementTree.fromstring(tracks._repr_html_().replace("<br>", "<br/>"))
    circles = page.findall(".//{*}circle")
    assert len(circles) == tracks.points
    for circle in circles:
        values = {move.get("attributeName"): move.get("values").split(";") for move in circle}
        assert {name: len(found) for name, found in values.items()} == {"cx": 4, "cy": 4, "opacity": 4}
    empty = Tracks(np.zeros((2, 0, 2)), np.zeros((2, 0), bool), np.zeros((2, 0)))
    assert "0 points through 2 frames" in empty._repr_html_()
    many = Tracks(np.random.default_rng(0).random((90, 1000, 2)) * 400, np.ones((90, 1000), bool), np.ones((90, 1000)))
    assert len(many._repr_html_()) < 80_000
