"""A data set by name and number: every layout, one shard in memory, broken parts as entries with their error."""

from __future__ import annotations

import pickle
import re
import tracemalloc

import numpy as np
import pytest

from corrdit.data import TapVidSet, TapVidVideo, read_tapvid, write_tapvid, write_tapvid_shards


def same(first: TapVidVideo, second: TapVidVideo) -> bool:
    return first.name == second.name and all(
        np.array_equal(getattr(first, field), getattr(second, field)) for field in ("video", "points", "occluded")
    )


@pytest.mark.parametrize("layout", ["davis", "kinetics"])
def test_a_set_holds_what_reading_it_through_gives(layout, request):
    path = request.getfixturevalue(layout)
    videos = TapVidSet(path)
    entries = videos.index()
    expected = list(read_tapvid(path))
    assert [entry.name for entry in entries] == [video.name for video in expected]
    for number in (4, 0, 3, 1, 2):
        assert same(videos.read(entries[number]), expected[number])


def test_generated_videos_are_read_with_their_exact_tracks(world):
    videos = TapVidSet(world)
    entries = videos.index()
    assert [entry.name for entry in entries] == ["0000", "0001", "0002"]
    video = videos.read(entries[1])
    with np.load(world / "0001.npz") as archive:
        np.testing.assert_array_equal(video.video, archive["video"])
        np.testing.assert_array_equal(video.occluded, ~archive["visible"].T)
        np.testing.assert_allclose(video.points * [48, 32], archive["xy"].transpose(1, 0, 2), atol=1e-5)


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    random = np.random.default_rng(0)
    shard_bytes = 50 * 150 * 180 * 3

    def made():
        for name in range(6):
            frames = random.integers(0, 256, (50, 150, 180, 3), dtype=np.uint8)
            yield TapVidVideo(str(name), frames, np.zeros((2, 50, 2)), np.zeros((2, 50), bool))

    write_tapvid_shards(tmp_path / "set", made(), count=6, shards=6, frames="raw")
    tracemalloc.start()
    videos = TapVidSet(tmp_path / "set")
    for entry in videos.index():
        videos.read(entry)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * shard_bytes


def test_neighbours_of_a_shard_are_read_without_opening_it_again(kinetics, monkeypatch):
    from corrdit.data import tapvid

    opened = []
    load = tapvid.load_arrays
    monkeypatch.setattr(tapvid, "load_arrays", lambda path: opened.append(path.name) or load(path))
    videos = TapVidSet(kinetics)
    entries = videos.index()
    assert len(opened) == 3
    for entry in entries:
        videos.read(entry)
    assert opened[3:] == ["0000_of_0003.pkl", "0001_of_0003.pkl", "0002_of_0003.pkl"]


def test_a_truncated_shard_is_an_entry_with_its_error(videos, tmp_path):
    write_tapvid_shards(tmp_path, videos, count=5, shards=3)
    shard = tmp_path / "0001_of_0003.pkl"
    shard.write_bytes(shard.read_bytes()[:400])
    opened = TapVidSet(tmp_path)
    entries = opened.index()
    assert [entry.name for entry in entries] == [
        "0000_of_0003/0000",
        "0001_of_0003.pkl",
        "0002_of_0003/0000",
        "0002_of_0003/0001",
    ]
    assert entries[1].error
    with pytest.raises(ValueError, match=r"0001_of_0003\.pkl is not a whole pickle"):
        opened.read(entries[1])
    assert opened.read(entries[2]).name == "0002_of_0003/0000"


def test_a_malicious_file_is_refused_and_nothing_of_it_is_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "davis.pkl"
    path.write_bytes(pickle.dumps({"dog": {"video": Malicious()}}))
    with pytest.raises(ValueError, match=r"asks for .*mkdir"):
        TapVidSet(path).index()
    assert not (tmp_path / "made").exists()


def test_foreign_sources_are_refused(tmp_path, world):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TapVidSet(tmp_path / "absent.pkl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither pickles .* nor videos of `corrdit world`"):
        TapVidSet(tmp_path / "empty")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a TAP-Vid file"):
        TapVidSet(tmp_path / "other.pkl").index()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"video": np.zeros((2, 4, 4, 3), np.uint8)}, "it lacks xy, visible"),
        (
            {"video": np.zeros((2, 4, 4, 3), np.uint8), "xy": np.zeros((2, 3, 2)), "visible": np.ones((3, 2), bool)},
            r"must be \[T, H, W, 3\]",
        ),
        ({"video": np.zeros((2, 4, 4, 3)), "xy": np.zeros((2, 3, 2)), "visible": np.ones((2, 3), bool)}, "uint8"),
        (None, "is not a video of `corrdit world`"),
    ],
)
def test_a_foreign_npz_is_named(tmp_path, arrays, message):
    path = tmp_path / "0000.npz"
    if arrays is None:
        path.write_bytes(b"PK\x03\x04 this is no archive")
    else:
        np.savez(path, **arrays)
    videos = TapVidSet(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        videos.read(videos.index()[0])
    assert re.search("0000", str(caught.value))


def test_a_video_is_shortened_with_its_annotation(videos):
    short = videos[0].shortened(3)
    assert short.video.shape[0] == short.points.shape[1] == short.occluded.shape[1] == 3
    assert videos[0].shortened(99) is videos[0]
    with pytest.raises(ValueError, match="frames must be"):
        videos[0].shortened(0)


def test_a_folder_of_pickles_by_any_name_is_one_set(videos, tmp_path):
    """RoboTAP: dicts by video name in `robotap_split0.pkl` ...; RGB-Stacking: a list in a folder of its own."""
    write_tapvid(tmp_path / "robotap_split0.pkl", videos[:2], frames="jpeg")
    write_tapvid(tmp_path / "robotap_split1.pkl", videos[2:4], frames="raw")
    names = ["robotap_split0/bear", "robotap_split0/camel", "robotap_split1/dog", "robotap_split1/goat"]
    of_set = TapVidSet(tmp_path)
    entries = of_set.index()
    assert [entry.name for entry in entries] == names == [video.name for video in read_tapvid(tmp_path)]
    np.testing.assert_array_equal(of_set.read(entries[2]).video, videos[2].video)
    np.testing.assert_allclose(of_set.read(entries[1]).points, videos[1].points)
    stacking = tmp_path / "tapvid_rgb_stacking"
    stacking.mkdir()
    write_tapvid(stacking / "tapvid_rgb_stacking.pkl", videos[:3], layout="list")
    listed = TapVidSet(stacking).index()
    assert [entry.name for entry in listed] == [f"tapvid_rgb_stacking/000{number}" for number in range(3)]
    np.testing.assert_array_equal(TapVidSet(stacking).read(listed[2]).video, videos[2].video)


def test_pickles_of_a_folder_are_not_trusted(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "robotap_split0.pkl").write_bytes(pickle.dumps({"video": {"video": Attack()}}))
    (entry,) = TapVidSet(tmp_path).index()
    assert "print" in str(entry.error)
