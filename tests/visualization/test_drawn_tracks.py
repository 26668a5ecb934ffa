"""Dots are where the tracks say, in the colour of their start, hollow where hidden; sheets hold what they get."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from corrdit.tracking import Tracks
from corrdit.video import probe_video
from corrdit.visualization import (
    TrackPainter,
    TrackStyle,
    contact_sheet,
    draw_tracks,
    iterate_drawn_tracks,
    position_colours,
    write_track_pictures,
)
from corrdit.visualization.sheet import cell_size, sheet_columns, sheet_frames

HEIGHT, WIDTH, FRAMES = 240, 320, 8
PLAIN = TrackStyle(trail=0, radius=6.0, fade=0.0)


def one_point(xy: np.ndarray, visible: bool = True) -> Tracks:
    path = np.tile(np.asarray(xy, np.float32), (FRAMES, 1, 1))
    return Tracks(xy=path, visible=np.full((FRAMES, 1), visible), score=np.ones((FRAMES, 1), np.float32))


def grey_video(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.full((FRAMES, height, width, 3), 128, np.uint8)


def centre_of_change(drawn: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of all changed pixels, in the coordinates of tracks (first pixel's centre at 0.5)."""
    weight = np.abs(drawn.astype(float) - 128).sum(-1)
    rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


@pytest.mark.parametrize("xy", [(100.0, 60.0), (100.5, 60.5), (33.3, 200.7)])
def test_a_dot_is_where_the_track_says(xy: tuple[float, float]) -> None:
    drawn = draw_tracks(grey_video(), one_point(xy), style=PLAIN)
    np.testing.assert_allclose(centre_of_change(drawn[3]), xy, atol=0.03)


def test_a_dot_has_the_colour_of_its_start() -> None:
    drawn = draw_tracks(grey_video(), one_point((100.5, 60.5)), style=PLAIN)
    wanted = position_colours(np.array([[100.5, 60.5]]), HEIGHT, WIDTH)[0] * 255
    np.testing.assert_allclose(drawn[0, 60, 100], wanted, atol=2)
    two = Tracks(
        xy=np.tile([(100.5, 60.5), (200.5, 60.5)], (FRAMES, 1, 1)),
        visible=np.ones((FRAMES, 2), bool),
        score=np.ones((FRAMES, 2)),
    )
    starts = np.array([[300.0, 10.0], [10.0, 10.0]])
    drawn = draw_tracks(grey_video(), two, starts=starts, style=PLAIN)
    wanted = position_colours(starts, HEIGHT, WIDTH) * 255
    np.testing.assert_allclose(drawn[0, 60, [100, 200]], wanted, atol=2)
    assert np.abs(wanted[0] - wanted[1]).max() > 100


def test_hidden_points_are_hollow_or_left_out() -> None:
    hidden = one_point((100.5, 60.5), visible=False)
    drawn = draw_tracks(grey_video(), hidden, style=PLAIN)[0]
    np.testing.assert_array_equal(drawn[60, 100], (128, 128, 128))
    assert np.abs(drawn[60, 106].astype(int) - 128).max() > 30, "the ring"
    without = draw_tracks(grey_video(), hidden, style=TrackStyle(trail=3, radius=6.0, fade=0.0, hidden=False))
    np.testing.assert_array_equal(without, grey_video())


def test_trails_follow_the_path_and_fade() -> None:
    path = np.zeros((FRAMES, 1, 2), np.float32)
    path[:, 0] = np.stack((40 + 30 * np.arange(FRAMES), np.full(FRAMES, 100)), -1)
    tracks = Tracks(xy=path, visible=np.ones((FRAMES, 1), bool), score=np.ones((FRAMES, 1)))
    drawn = draw_tracks(grey_video(), tracks, style=TrackStyle(trail=4, radius=4.0, fade=0.0))
    change = np.abs(drawn[6].astype(int) - 128).sum(-1)
    assert change[100, 40 + 30 * 4 + 15] > change[100, 40 + 30 * 2 + 15] > 0, "older parts are fainter"
    assert change[100, 40 + 15] == 0, "only four frames back"
    assert change[100, 40 + 30 * 6 + 15] == 0, "nothing ahead"
    short = draw_tracks(grey_video(), tracks, style=TrackStyle(trail=4, radius=4.0, fade=0.0, leap=0.07))
    assert np.abs(short[6, 100, 40 + 30 * 4 + 15].astype(int) - 128).sum() == 0, "a step of 30 pixels is a leap of 28"
    visible = np.arange(FRAMES)[:, None] != 5
    gap = Tracks(xy=path, visible=visible, score=np.ones((FRAMES, 1)))
    drawn = draw_tracks(grey_video(), gap, style=TrackStyle(trail=4, radius=4.0, fade=0.0))
    change = np.abs(drawn[7].astype(int) - 128).sum(-1)
    assert change[100, 40 + 30 * 3 + 15] > 0
    assert change[100, 40 + 30 * 4 + 15] == change[100, 40 + 30 * 5 + 15] == 0, "no trail where it is hidden"


def test_uncertain_places_are_fainter() -> None:
    """Beside the median score of its video; scores of another scale draw the same picture."""
    xy = np.tile([(60.5, 60.5), (160.5, 60.5), (260.5, 60.5)], (FRAMES, 1, 1)).astype(np.float32)
    score = np.tile([0.02, 0.1, 0.4], (FRAMES, 1))
    visible = np.ones((FRAMES, 3), bool)
    starts = np.tile((60.5, 60.5), (3, 1))
    drawn = draw_tracks(grey_video(), Tracks(xy, visible, score), starts=starts, style=PLAIN)
    wanted = position_colours(starts[:1], HEIGHT, WIDTH)[0] * 255
    np.testing.assert_allclose(drawn[0, 60, [160, 260]], np.tile(wanted, (2, 1)), atol=2)
    change = np.abs(drawn[0, 60, [60, 160]].astype(int) - 128).sum(-1)
    assert 0.1 * change[1] < change[0] < 0.5 * change[1]
    larger = draw_tracks(grey_video(), Tracks(xy, visible, 50 * score), starts=starts, style=PLAIN)
    np.testing.assert_array_equal(larger, drawn)


def test_drawing_one_by_one_is_the_same() -> None:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (FRAMES, HEIGHT, WIDTH, 3), dtype=np.uint8)
    tracks = Tracks(
        xy=rng.uniform(0, 240, (FRAMES, 9, 2)), visible=rng.random((FRAMES, 9)) > 0.3, score=np.ones((FRAMES, 9))
    )
    streamed = np.stack(list(iterate_drawn_tracks(iter(video), tracks, HEIGHT, WIDTH)))
    np.testing.assert_array_equal(streamed, draw_tracks(video, tracks))


def test_small_videos_are_enlarged_and_sizes_can_be_chosen() -> None:
    tiny = np.full((FRAMES, 64, 96, 3), 128, np.uint8)
    assert draw_tracks(tiny, one_point((10, 10))).shape == (FRAMES, 320, 480, 3)
    flat = np.full((FRAMES, 8, 900, 3), 128, np.uint8)
    assert draw_tracks(flat, one_point((10, 4))).shape == (FRAMES, 16, 1800, 3), "no larger than a screen"
    drawn = draw_tracks(tiny, one_point((48, 16)), size=(240, 320), style=PLAIN)
    np.testing.assert_allclose(centre_of_change(drawn[0]), (160, 60), atol=0.1)


def test_points_outside_and_no_points_are_fine() -> None:
    style = TrackStyle(fade=0.0)
    np.testing.assert_array_equal(draw_tracks(grey_video(), one_point((-50, 1e6)), style=style), grey_video())
    none = Tracks(xy=np.zeros((FRAMES, 0, 2)), visible=np.zeros((FRAMES, 0), bool), score=np.zeros((FRAMES, 0)))
    np.testing.assert_array_equal(draw_tracks(grey_video(), none, style=style), grey_video())


def test_bad_input() -> None:
    tracks = one_point((1, 1))
    with pytest.raises(ValueError, match=r"float64 \[8, 240, 320, 3\]; accepted is uint8"):
        draw_tracks(grey_video() / 255.0, tracks)
    with pytest.raises(ValueError, match="the video has 7 frames, the tracks have 8"):
        draw_tracks(grey_video()[1:], tracks)
    with pytest.raises(ValueError, match="starts has 2 points, the tracks have 1"):
        TrackPainter(tracks, HEIGHT, WIDTH, starts=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="frame 8 was asked for"):
        TrackPainter(tracks, HEIGHT, WIDTH).draw(grey_video()[0], 8)
    for wrong in ({"trail": -1}, {"radius": 0.0}, {"fade": 1.5}, {"leap": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrackStyle(**wrong)  # type: ignore[arg-type]


def test_colours_differ_with_distance_and_are_vivid() -> None:
    y, x = np.mgrid[0:HEIGHT:20, 0:WIDTH:20]
    points = np.stack((x, y), -1).reshape(-1, 2).astype(float)
    colours = position_colours(points, HEIGHT, WIDTH)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert (colours.max(1) - colours.min(1)).min() > 0.2, "none is grey"
    distance = np.linalg.norm((points[:, None] - points[None]) / (WIDTH, HEIGHT), axis=-1)
    difference = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert difference[distance > 0.5].min() > 0.12
    row = position_colours(np.stack((np.arange(WIDTH), np.full(WIDTH, 50)), -1), HEIGHT, WIDTH)
    assert np.abs(np.diff(row, axis=0)).max() < 0.12, "without jumps"


def test_sheet_layout() -> None:
    assert sheet_frames(24) == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]
    assert sheet_frames(3) == [0, 1, 2]
    assert sheet_columns(12, 480, 720) == 3
    assert sheet_columns(12, 720, 480) == 4
    assert sheet_columns(1, 480, 720) == 1
    height, width = cell_size(12, 480, 720)
    assert height / width == pytest.approx(480 / 720, rel=0.01)
    assert cell_size(6, 300, 2) == (900, 6), "nor do flat ones make a sheet of metres"
    assert cell_size(12, 32, 32) == (320, 320), "tiny videos are not blown up to a whole sheet"


def test_contact_sheet_shows_every_picture(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(0, 255, (6, 3), dtype=np.uint8)
    pictures = [np.full((60, 90, 3), colour, np.uint8) for colour in colours]
    sheet = contact_sheet(pictures, [f"frame {i}" for i in range(6)], path=tmp_path / "sheet.png", caption="six")
    np.testing.assert_array_equal(imageio.imread(tmp_path / "sheet.png"), sheet)
    for colour in colours:
        assert (np.abs(sheet.astype(int) - colour).max(-1) <= 3).sum() > 60 * 90, "at its size or larger"
    unlabelled = contact_sheet(pictures, [""] * 6)
    assert unlabelled.shape[0] < sheet.shape[0], "no line for a caption"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_contact_sheet_refuses(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="0 pictures and 0 labels"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="1 pictures and 2 labels"):
        contact_sheet([picture], ["a", "b"])
    with pytest.raises(ValueError, match="different sizes"):
        contact_sheet([picture, picture[:4]], ["a", "b"])
    with pytest.raises(ValueError, match=r"does not end in \.png"):
        contact_sheet([picture], ["a"], path=tmp_path / "sheet.jpg")


def test_video_and_sheet_in_one_pass(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    write_track_pictures(
        iter(grey_video()),
        one_point((20, 20)),
        (HEIGHT, WIDTH),
        queries=np.array([[0, 20, 20]]),
        fps=8,
        video_path=tmp_path / "tracks.gif",
        sheet_path=tmp_path / "tracks.png",
        progress=lambda done, total: reports.append((done, total)),
    )
    assert reports == [(count, FRAMES) for count in range(1, FRAMES + 1)]
    info = probe_video(tmp_path / "tracks.gif")
    assert (info.frames, info.height, info.width) == (FRAMES, HEIGHT, WIDTH)
    assert imageio.imread(tmp_path / "tracks.png").shape[1] > 4 * WIDTH
