"""Annotated real videos: joints in BADJA's layout with and without masks, true flow in KITTI's, and their figures."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from corrdit.cli import main
from corrdit.data import TapVidSet
from corrdit.evaluation.scoring import evaluate_video, points_interval, share_of_correct_keypoints
from corrdit.tracking import Tracks
from corrdit.tracking.baselines import standing_still
from corrdit.video import read_video, write_video

FRAMES = 7
ANNOTATED = (1, 3, 6)
JOINTS = np.array(
    [[[540, 960], [270, 480], [0, 0]], [[540, 990], [270, 480], [810, 480]], [[540, 1200], [0, 0], [810, 486]]]
)
VISIBLE = [[True, True, False], [True, True, True], [True, False, True]]
"""Of the annotated frames: (row, column) at 1080 x 1920."""


def write_joints(folder: Path, *, mask_side: int | None = None) -> None:
    entries = [
        {
            "image_path": f"DAVIS/JPEGImages/Full-Resolution/deer/{frame:05d}.jpg",
            "segmentation_path": f"DAVIS/Annotations/Full-Resolution/deer/{frame:05d}.png",
            "joints": JOINTS[number].tolist(),
            "visibility": VISIBLE[number],
        }
        for number, frame in enumerate(ANNOTATED)
    ]
    (folder / "deer.json").write_text(json.dumps(entries), encoding="utf-8")
    write_video(folder / "deer.mp4", np.zeros((FRAMES, 108, 192, 3), dtype=np.uint8) + 90, fps=10)
    if mask_side is not None:
        (folder / "deer").mkdir()
        for frame in ANNOTATED[:2]:
            mask = np.zeros((1080, 1920), dtype=np.uint8)
            mask[100 : 100 + mask_side, 200 : 200 + mask_side] = 255
            Image.fromarray(mask).save(folder / "deer" / f"{frame:05d}.png")


def write_deep_png(file: Path, values: np.ndarray) -> None:
    """uint16 [H, W, 3] as a PNG of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_flow(folder: Path) -> None:
    flow = np.full((64, 96, 3), 2**15, dtype=np.uint16)
    flow[..., 0] += 64 * 3
    flow[..., 1] -= 96
    flow[..., 2] = 1
    flow[:32, :, 2] = 0
    write_deep_png(folder / "street_flow_gt.png", flow)
    for number in (1, 2):
        Image.fromarray(np.full((64, 96, 3), 40 * number, dtype=np.uint8)).save(folder / f"street_frame{number}.png")


def test_joints_begin_at_the_first_frame_in_which_they_are_annotated(tmp_path: Path) -> None:
    write_joints(tmp_path)
    (entry,) = (videos := TapVidSet(tmp_path)).index()
    video = videos.read(entry)
    assert (entry.name, video.video.shape, video.reach) == ("deer", (FRAMES, 256, 256, 3), None)
    sample = video.sample("first")
    np.testing.assert_allclose(sample.queries, [[1, 128, 128], [1, 64, 64], [3, 64, 192]])
    np.testing.assert_array_equal(
        ~sample.occluded,
        np.isin(np.arange(FRAMES), ANNOTATED)
        & np.array([[True] * 7, [frame != 6 for frame in range(7)], [frame > 1 for frame in range(7)]]),
    )
    # From the queries the first joint goes 4 and 32 pixels of 256, the second none, the third .8.
    figures = evaluate_video(lambda clip, queries: standing_still(queries, len(clip)), sample).record["figures"]
    assert [figures[f"pts_within_{distance}"] for distance in (1, 2, 4, 8, 16)] == [0.5, 0.5, 0.5, 0.75, 0.75]


def test_only_annotated_frames_are_scored(tmp_path: Path) -> None:
    """The true places everywhere, called visible: wrong where a joint is annotated as hidden, and nowhere else."""
    write_joints(tmp_path)
    (entry,) = (videos := TapVidSet(tmp_path)).index()
    sample = videos.read(entry).sample("first")
    np.testing.assert_array_equal(sample.annotated_frames(), ANNOTATED)

    def true_places(clip: np.ndarray, queries: np.ndarray) -> Tracks:
        xy = torch.from_numpy(np.nan_to_num(sample.tracks.transpose(1, 0, 2))).float()
        return Tracks(xy, torch.ones(xy.shape[:2], dtype=torch.bool), torch.ones(xy.shape[:2]))

    record = evaluate_video(true_places, sample).record
    # Scored are frames 3 and 6 of the first two joints and frame 6 of the third: of the five the second is hidden once.
    assert record["figures"]["occlusion_accuracy"] == pytest.approx(4 / 5)
    assert record["figures"]["average_jaccard"] == pytest.approx(4 / 5)
    assert record["figures"]["average_pts_within_thresh"] == 1.0
    # The first joint moves 4 pixels of 256 in two frames and 28 in three. The third is hidden at first.
    parts = {name: part["points"] for name, part in record["splits"].items() if part["points"]}
    assert parts == {
        "motion: still": 2,
        "motion: medium": 1,
        "reappearance: never back": 2,
        "reappearance: back once or twice": 1,
    }


def test_masks_are_part_of_what_a_clip_is(tmp_path: Path) -> None:
    write_joints(tmp_path, mask_side=500)
    mask = tmp_path / "deer" / "00001.png"
    (before,) = TapVidSet(tmp_path).index()
    Image.fromarray(np.zeros((108, 192), dtype=np.uint8)).save(mask)
    (empty,) = (videos := TapVidSet(tmp_path)).index()
    reach = videos.read(empty).reach
    assert reach is not None
    assert np.isnan(reach[1]).all()
    assert np.isfinite(reach[3]).all()
    mask.unlink()
    (without,) = TapVidSet(tmp_path).index()
    assert len({before.digest, empty.digest, without.digest}) == 3

    Image.fromarray(np.full((20, 96), 255, dtype=np.uint8)).save(mask)
    with pytest.raises(ValueError, match=r"00001.png is of 20 x 96; its sides must be to each other as those of 1080"):
        videos.read(empty)
    mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"the mask .*00001.png cannot be read as a picture"):
        videos.read(empty)


def test_clips_that_are_not_whole_or_of_one_name_are_said(tmp_path: Path) -> None:
    write_joints(tmp_path)
    write_flow(tmp_path)
    (tmp_path / "notes.json").write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="with the video beside them: give "):
        TapVidSet(tmp_path / "deer.json").index()
    (tmp_path / "deer.mp4").unlink()
    (tmp_path / "street_frame2.png").unlink()
    entries = TapVidSet(tmp_path).index()
    assert [entry.name for entry in entries] == ["deer", "street"]
    assert "deer.mp4" in str(entries[0].error)
    assert "street_frame2.png" in str(entries[1].error)
    write_joints(tmp_path)
    for ending in ("json", "mp4"):
        (tmp_path / f"deer.{ending}").rename(tmp_path / f"street.{ending}")
    with pytest.raises(ValueError, match=r"two clips called 'street': street.json and street_flow_gt.png"):
        TapVidSet(tmp_path)


def test_pictures_are_drawn_of_clips_that_are_evaluated_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "annotated").mkdir()
    write_joints(folder)
    write_flow(folder)
    output = tmp_path / "scores"
    words = ["evaluate", "--badja", str(folder), "--output", str(output), "--trackers", "still"]
    assert main([*words, "--pictures", "1"]) == 0
    drawn = {file.relative_to(output / "pictures").as_posix() for file in output.rglob("*.png")}
    assert drawn == {"still/deer.png", "truth/deer.png"}
    figures = output / "videos" / "still" / "street.json"
    before = figures.stat().st_mtime_ns
    assert main([*words, "--pictures", "2"]) == 0
    assert len(list(output.rglob("*.png"))) == 4
    assert figures.stat().st_mtime_ns == before
    # The truth is drawn over the three annotated frames, tracks over all seven.
    shown = [read_video(output / "pictures" / name / "deer.mp4").frames for name in ("truth", "still")]
    assert [len(frames) for frames in shown] == [len(ANNOTATED), FRAMES]
    capsys.readouterr()
    (folder / "street_flow_gt.png").unlink()
    assert main(words) == 2
    assert "street no longer there" in capsys.readouterr().err


def test_the_metrics_of_joints_are_those_of_their_masks_and_points(tmp_path: Path) -> None:
    """PCK's distance is .2 * 500 = 100 pixels of full resolution; the last frame has no mask."""
    write_joints(tmp_path, mask_side=500)
    (entry,) = (videos := TapVidSet(tmp_path)).index()
    sample = videos.read(entry).sample("first")
    assert sample.reach is not None
    np.testing.assert_allclose(sample.reach[[1, 3]], [[256 * 100 / 1920, 256 * 100 / 1080]] * 2)
    assert np.isnan(sample.reach[[0, 2, 4, 5, 6]]).all()

    def shifted(x: float, y: float) -> Tracks:
        xy = torch.from_numpy(np.nan_to_num(sample.tracks.transpose(1, 0, 2)) + [x, y]).float()
        return Tracks(xy, torch.ones(xy.shape[:2], dtype=torch.bool), torch.ones(xy.shape[:2]))

    assert share_of_correct_keypoints(sample, shifted(13.2, 0.0)) == 1.0
    assert share_of_correct_keypoints(sample, shifted(0.0, 23.6)) == 1.0
    assert share_of_correct_keypoints(sample, shifted(13.5, 0.0)) == 0.0
    assert points_interval(sample, shifted(3.0, 0.0)) == (0.6, 0.6)
    still = points_interval(sample, standing_still(sample.queries, FRAMES))
    assert still is not None
    assert 0.2 <= still[0] < 0.6 < still[1] <= 1.0


def test_true_flow_is_followed_where_it_is_known(tmp_path: Path) -> None:
    write_flow(tmp_path)
    (entry,) = (videos := TapVidSet(tmp_path)).index()
    video = videos.read(entry)
    assert (entry.name, video.video.shape) == ("street", (2, 256, 256, 3))
    assert len(video.points) == 2 * 6
    np.testing.assert_allclose(video.points[0, 0], [8.5 / 96, 40.5 / 64])
    np.testing.assert_allclose(np.diff(video.points, axis=1)[:, 0], [[3 / 96, -1.5 / 64]] * 12, atol=1e-12)
    write_deep_png(tmp_path / "street_flow_gt.png", np.zeros((32, 96, 3), dtype=np.uint16))
    with pytest.raises(ValueError, match="is of 32 x 96 and its pictures of"):
        videos.read(entry)
    Image.fromarray(np.zeros((64, 96, 3), dtype=np.uint8)).save(tmp_path / "street_flow_gt.png")
    with pytest.raises(ValueError, match="must be a PNG of three channels of 16 bits, got rgb24"):
        videos.read(entry)


def test_the_command_shows_every_clip_with_intervals_over_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "annotated").mkdir()
    write_joints(folder, mask_side=500)
    write_flow(folder)
    output = tmp_path / "scores"
    assert main(["evaluate", "--badja", str(folder), "--output", str(output), "--trackers", "still"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("over points", "deer", "street"))
    with open(output / "videos.csv", encoding="utf-8") as file:
        rows = {row["video"]: row for row in csv.DictReader(file)}
    assert float(rows["deer"]["average_pts_within_thresh"]) == pytest.approx(0.6)
    assert float(rows["deer"]["average_pts_within_thresh_low"]) < 0.6
    assert float(rows["deer"]["pck"]) == 1.0
    assert rows["street"]["pck"] == ""
    # It stays 3 x 256/96 = 8 and 1.5 x 4 = 6 pixels behind: within 16 only.
    assert float(rows["street"]["average_pts_within_thresh"]) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("[]", "holds no annotated frame"),
        ("{", "is no list of annotated joints"),
        ('[{"image_path": "a/00001.jpg", "joints": [[1, 2]]}]', "is no list of annotated joints"),
        ('[{"image_path": "a/00001.jpg", "joints": [[1, 2]], "visibility": [true, true]}]', "is no list of"),
        ('[{"image_path": "a/00001.jpg", "joints": [[1, 2]], "visibility": ["false"]}]', "give true or false of each"),
        (
            '[{"image_path": "a/00001.jpg", "joints": [[1, 2]], "visibility": [true]}, '
            '{"image_path": "a/00001.jpg", "joints": [[1, 3]], "visibility": [true]}]',
            "frame 1 is annotated twice",
        ),
        (
            '[{"image_path": "a/00007.jpg", "joints": [[1, 2]], "visibility": [true]}]',
            "does not fit a video of 7 frames",
        ),
    ],
)
def test_files_that_are_no_annotation_are_refused(contents: str, message: str, tmp_path: Path) -> None:
    write_joints(tmp_path)
    (tmp_path / "deer.json").write_text(contents, encoding="utf-8")
    (entry,) = (videos := TapVidSet(tmp_path)).index()
    with pytest.raises(ValueError, match=message):
        videos.read(entry)
