"""TAP-Vid files: reading, writing, choosing queries, and the way from a prediction to the metric."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from corrdit import Tracks, metrics
from corrdit.data.restricted_pickle import load_arrays
from corrdit.data.tapvid import TapVidVideo, read_tapvid
from corrdit.data.tapvid_set import TapVidSet
from corrdit.data.tapvid_writing import write_tapvid, write_tapvid_shards


def some_video(name: str = "dog", seed: int = 0, frames: int = 7, points: int = 5, size=(24, 40)) -> TapVidVideo:
    random = np.random.default_rng(seed)
    smooth = np.kron(random.integers(0, 256, (frames, 3, 5, 3)), np.ones((1, size[0] // 3, size[1] // 5, 1)))
    return TapVidVideo(
        name, smooth.astype(np.uint8), random.random((points, frames, 2)), random.random((points, frames)) < 0.4
    )


def same(first: TapVidVideo, second: TapVidVideo) -> bool:
    return (
        np.array_equal(first.video, second.video)
        and np.array_equal(first.points, second.points)
        and np.array_equal(first.occluded, second.occluded)
    )


def test_davis_and_rgb_stacking_layouts(tmp_path):
    videos = [some_video("zebra", 1), some_video("ant", 2, frames=4)]
    write_tapvid(tmp_path / "davis.pkl", videos)
    again = list(read_tapvid(tmp_path / "davis.pkl"))
    assert [video.name for video in again] == ["ant", "zebra"]
    assert same(again[0], videos[1])
    assert same(again[1], videos[0])
    write_tapvid(tmp_path / "stacking.pkl", videos, layout="list")
    again = list(read_tapvid(tmp_path / "stacking.pkl"))
    assert [video.name for video in again] == ["0000", "0001"]
    assert same(again[0], videos[0])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["davis.pkl", "stacking.pkl"]


def test_files_written_with_ordinary_pickle_are_read(tmp_path):
    video = some_video()
    entry = {"video": video.video, "points": video.points.astype(np.float32), "occluded": video.occluded}
    (tmp_path / "davis.pkl").write_bytes(pickle.dumps({"dog": entry}, 5))
    (again,) = read_tapvid(tmp_path / "davis.pkl")
    np.testing.assert_array_equal(again.video, video.video)
    np.testing.assert_allclose(again.points, video.points, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.mp4", "clip.mp4 is a video or a picture; a TAP-Vid file is a pickle"),
        ("https://example.com/davis.pkl", "is an address, and only files and folders are read; download it first"),
    ],
)
def test_what_people_give_in_place_of_a_tapvid_file_is_named(tmp_path, name, message):
    path = name if "://" in name else tmp_path / name
    if path != name:
        path.write_bytes(b"\0\0\0 ftypisom")
    with pytest.raises(ValueError, match=message):
        list(read_tapvid(path))
    with pytest.raises(ValueError, match=message):
        TapVidSet(path).index()


@pytest.mark.parametrize("container", [np.array, list, lambda frames: np.array(frames, dtype=object)])
def test_jpeg_frames_are_decoded(tmp_path, container):
    video = some_video()
    write_tapvid(tmp_path / "davis.pkl", [video], frames="jpeg")
    encoded = list(load_arrays(tmp_path / "davis.pkl")["dog"]["video"])
    assert all(frame.startswith(b"\xff\xd8") for frame in encoded)
    entry = {"video": container(encoded), "points": video.points, "occluded": video.occluded}
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([entry]))
    for name in ("davis.pkl", "other.pkl"):
        (again,) = read_tapvid(tmp_path / name)
        assert again.video.dtype == np.uint8
        assert np.abs(again.video.astype(int) - video.video).mean() < 8


def test_shards_are_streamed_and_every_video_comes_once(tmp_path):
    videos = [some_video(f"video {index}", index) for index in range(7)]
    write_tapvid_shards(tmp_path / "kinetics", iter(videos), count=7, shards=3, frames="raw")
    assert sorted(path.name for path in (tmp_path / "kinetics").iterdir()) == [
        "0000_of_0003.pkl",
        "0001_of_0003.pkl",
        "0002_of_0003.pkl",
    ]
    again = list(read_tapvid(tmp_path / "kinetics"))
    assert [video.name for video in again] == [
        "0000_of_0003/0000",
        "0000_of_0003/0001",
        "0001_of_0003/0000",
        "0001_of_0003/0001",
        "0002_of_0003/0000",
        "0002_of_0003/0001",
        "0002_of_0003/0002",
    ]
    assert all(same(*pair) for pair in zip(again, videos, strict=True))


def test_one_shard_is_in_memory_at_a_time(tmp_path):
    shard_bytes = 8 * 1000 * 1000
    videos = (some_video(str(index), index, frames=50, size=(300, 180)) for index in range(6))
    write_tapvid_shards(tmp_path / "kinetics", videos, count=6, shards=6, frames="raw")
    assert (tmp_path / "kinetics" / "0000_of_0006.pkl").stat().st_size > shard_bytes
    tracemalloc.start()
    for _ in read_tapvid(tmp_path / "kinetics"):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * shard_bytes


def hand_made() -> TapVidVideo:
    """Three points in four frames: seen from the start, from frame 2 on, never."""
    occluded = np.array([[0, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    points = np.linspace(0, 1, 3 * 4 * 2).reshape(3, 4, 2)
    return TapVidVideo("hand", np.zeros((4, 10, 20, 3), np.uint8), points, occluded)


def test_queries_first_and_frame_0():
    video = hand_made()
    pixels = video.points * [20, 10]
    first = video.sample("first")
    np.testing.assert_allclose(first.queries, [[0, *pixels[0, 0]], [2, *pixels[1, 2]]])
    np.testing.assert_array_equal(first.point, [0, 1])
    np.testing.assert_allclose(first.tracks, pixels[:2])
    frame_0 = video.sample("frame_0")
    np.testing.assert_allclose(frame_0.queries, [[0, *pixels[0, 0]]])
    assert frame_0.metric_mode == first.metric_mode == "first"


def test_queries_strided_come_frame_by_frame():
    video = hand_made()
    pixels = video.points * [20, 10]
    sample = video.sample("strided", stride=3)
    np.testing.assert_allclose(sample.queries, [[0, *pixels[0, 0]], [3, *pixels[0, 3]], [3, *pixels[1, 3]]])
    np.testing.assert_array_equal(sample.point, [0, 0, 1])
    assert sample.metric_mode == "strided"
    assert len(video.sample("strided").queries) == 1


def test_a_video_without_visible_points_has_no_queries():
    video = some_video()
    hidden = TapVidVideo("hidden", video.video, np.full_like(video.points, np.nan), np.ones_like(video.occluded))
    for mode in ("first", "strided", "frame_0"):
        assert hidden.sample(mode).queries.shape == (0, 3)


@pytest.mark.parametrize("mode", ["first", "strided", "frame_0"])
def test_the_truth_scores_one_and_a_known_offset_scores_as_it_should(mode):
    sample = some_video(frames=9, points=12).sample(mode, stride=2)
    truth = Tracks(sample.tracks.transpose(1, 0, 2), ~sample.occluded.T, np.ones(sample.occluded.T.shape))
    figures = metrics.tapvid(**sample.metric_arguments(truth))
    assert all(value[0] == 1 for value in figures.values())
    # The video is 40 pixels wide and 24 high: 0.5 pixel to the right is 3.2 of 256.
    shifted = Tracks(truth.xy.numpy() + [0.5, 0.0], truth.visible, truth.score)
    figures = metrics.tapvid(**sample.metric_arguments(shifted))
    assert [figures[f"pts_within_{d}"][0] for d in (1, 2, 4, 8)] == [0, 0, 1, 1]
    lower = Tracks(truth.xy.numpy() + [0.0, 0.5], truth.visible, truth.score)
    figures = metrics.tapvid(**sample.metric_arguments(lower))
    assert [figures[f"pts_within_{d}"][0] for d in (4, 8)] == [0, 1]


def test_metric_query_points_are_t_y_x_of_256():
    sample = hand_made().sample("first")
    truth = Tracks(
        np.nan_to_num(sample.tracks).transpose(1, 0, 2), ~sample.occluded.T, np.ones(sample.occluded.T.shape)
    )
    arguments = sample.metric_arguments(truth)
    x, y = hand_made().points[1, 2]
    np.testing.assert_allclose(arguments["query_points"][0, 1], [2, y * 256, x * 256])
    with pytest.raises(ValueError, match="4 frames and 2 queries, the prediction has 4 frames and 1 points"):
        sample.metric_arguments(Tracks(truth.xy[:, :1], truth.visible[:, :1], truth.score[:, :1]))


def changed(**changes) -> dict:
    video = some_video()
    return {"video": video.video, "points": video.points, "occluded": video.occluded} | changes


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"frames": 1}, "must hold video, points and occluded, found frames"),
        ([1, 2], "must hold video, points and occluded, found list"),
        (changed(video=np.zeros((7, 24, 40, 3))), "frames must be uint8"),
        (changed(video=np.zeros((7, 24, 40), np.uint8)), "frames must be uint8"),
        (changed(video=np.zeros((6, 24, 40, 3), np.uint8)), r"points must be numbers \[points, 6 frames, 2\]"),
        (changed(video=[b"\xff\xd8 not a picture"] * 7), "frame 0 cannot be decoded"),
        (changed(video=[b"\xff\xd8 not a picture", None]), "frame 0 cannot be decoded"),
        (changed(video=[None, b"\xff\xd8"]), "frames must be uint8"),
        (changed(video=None), "frames must be an array or a list of jpeg files, got NoneType"),
        (changed(video=5), "frames must be an array or a list of jpeg files, got int"),
        (changed(video={"a": 1}), "frames must be an array or a list of jpeg files, got dict"),
        (changed(points=[[0.5], [0.5, 0.5]]), "points is not an array"),
        (changed(occluded=np.zeros((5, 6), bool)), "occluded must be boolean"),
        (changed(occluded=np.full((5, 7), 0.3)), "occluded must be boolean"),
        (changed(points=np.full((5, 7, 2), np.nan), occluded=np.zeros((5, 7), bool)), "NaN"),
        (changed(points=np.full((5, 7, 2), 200.0), occluded=np.zeros((5, 7), bool)), "not pixels"),
    ],
)
def test_a_broken_video_is_named_and_left_out_on_request(tmp_path, entry, message):
    path = tmp_path / "davis.pkl"
    good = some_video("good")
    good_entry = {"video": good.video, "points": good.points, "occluded": good.occluded}
    path.write_bytes(pickle.dumps([entry, good_entry]))
    with pytest.raises(ValueError, match=rf"davis\.pkl: video '0000'.*{message}"):
        list(read_tapvid(path))
    broken = {}
    (left,) = read_tapvid(path, on_broken=lambda name, error: broken.update({name: str(error)}))
    assert same(left, good)
    assert list(broken) == ["0000"]
    assert re.search(message, broken["0000"])


def test_foreign_files_and_incomplete_folders_are_refused(tmp_path):
    for contents in ({}, [], 3, {"a": 1}, "text"):
        (tmp_path / "other.pkl").write_bytes(pickle.dumps(contents))
        with pytest.raises(ValueError, match="not a TAP-Vid file"):
            list(read_tapvid(tmp_path / "other.pkl"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no shards"):
        list(read_tapvid(empty))
    write_tapvid_shards(tmp_path / "kinetics", [some_video(str(i)) for i in range(3)], count=3, shards=3)
    (tmp_path / "kinetics" / "0001_of_0003.pkl").unlink()
    with pytest.raises(ValueError, match=r"missing are 0001_of_0003.*--incomplete"):
        list(read_tapvid(tmp_path / "kinetics"))
    there = ["0000_of_0003/0000", "0002_of_0003/0000"]
    assert [video.name for video in read_tapvid(tmp_path / "kinetics", incomplete=True)] == there
    assert [entry.name for entry in TapVidSet(tmp_path / "kinetics", incomplete=True).index()] == there
    (tmp_path / "kinetics" / "0000_of_0002.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="different sets must not share a folder"):
        list(read_tapvid(tmp_path / "kinetics", incomplete=True))
    with pytest.raises(FileNotFoundError):
        list(read_tapvid(tmp_path / "absent.pkl"))


def test_a_truncated_shard_is_counted_and_the_others_are_read(tmp_path):
    write_tapvid_shards(tmp_path / "set", [some_video(str(i)) for i in range(3)], count=3, shards=3, frames="raw")
    shard = tmp_path / "set" / "0001_of_0003.pkl"
    shard.write_bytes(shard.read_bytes()[:500])
    broken = []
    names = [video.name for video in read_tapvid(tmp_path / "set", on_broken=lambda name, error: broken.append(name))]
    assert names == ["0000_of_0003/0000", "0002_of_0003/0000"]
    assert broken == ["0001_of_0003.pkl"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda folder: write_tapvid(folder / "a.pkl", []), "videos is empty"),
        (lambda folder: write_tapvid(folder / "a.pkl", [some_video(), some_video()]), "same name"),
        (lambda folder: write_tapvid(folder / "a.pkl", [some_video()], layout="tuple"), "layout must be one of"),
        (lambda folder: write_tapvid(folder / "a.pkl", [some_video()], frames="png"), "frames must be one of"),
        (lambda folder: write_tapvid_shards(folder, [some_video()], count=1, shards=2), "cannot fill 2 shards"),
        (lambda folder: write_tapvid_shards(folder, [some_video()], count=2, shards=1), "ended after 1"),
        (lambda folder: write_tapvid_shards(folder, [some_video()] * 2, count=1, shards=1), "more videos than count=1"),
        (lambda folder: some_video().sample("last"), "mode must be one of"),
        (lambda folder: some_video().sample("strided", stride=0), "stride must be"),
    ],
)
def test_writing_and_sampling_refuse(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


@pytest.mark.parametrize("videos", [2, 4])
def test_shards_are_all_written_or_none(tmp_path: Path, videos: int) -> None:
    with pytest.raises(ValueError, match="nothing was written"):
        write_tapvid_shards(tmp_path, [some_video()] * videos, count=3, shards=3, frames="raw")
    assert not any(tmp_path.iterdir())
    write_tapvid_shards(tmp_path, [some_video()] * 3, count=3, shards=3, frames="raw")
    assert len(list(read_tapvid(tmp_path))) == 3
