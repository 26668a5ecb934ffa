"""Pictures of displacement fields."""

import numpy as np
import pytest

from corrdit.video import read_video
from corrdit.visualization import (
    colour_wheel,
    draw_flow_arrows,
    flow_colours,
    full_colour_at,
    write_flow_pictures,
    write_loss_curve,
    write_side_by_side,
)


def test_direction_is_hue_and_length_is_saturation():
    flow = np.array([[4.0, 0], [2, 0], [0, 0], [0, 4], [-4, 0]])
    colours = flow_colours(flow).astype(int)
    np.testing.assert_array_equal(colours[2], [255, 255, 255])
    np.testing.assert_array_equal(colours[0], [255, 0, 0])
    np.testing.assert_allclose(colours[1], [255, 128, 128], atol=1)
    np.testing.assert_array_equal(colours[4], [0, 255, 255])
    assert len({tuple(colour) for colour in colours}) == 5
    np.testing.assert_array_equal(flow_colours(2 * flow), colours)
    np.testing.assert_array_equal(flow_colours(2 * flow, largest=4)[1], [255, 0, 0])


def test_the_wheel_shows_each_direction_where_it_points():
    wheel = colour_wheel(65)
    np.testing.assert_allclose(wheel[32, 64].astype(int), [255, 0, 0], atol=8)
    np.testing.assert_allclose(wheel[32, 0].astype(int), [0, 255, 255], atol=8)
    np.testing.assert_array_equal(wheel[32, 32], [255, 255, 255])
    np.testing.assert_array_equal(wheel[0, 0], [255, 255, 255])


def test_arrows_change_the_picture_only_round_their_tokens():
    frame = np.full((64, 64, 3), 90, np.uint8)
    flow = np.zeros((4, 4, 2))
    flow[1, 1] = [1, 0]
    drawn = draw_flow_arrows(frame, flow)
    changed = (drawn != 90).any(-1)
    assert drawn.shape == frame.shape
    assert changed[24, 26:38].any()
    longest = changed.sum(1).argmax()
    assert 20 <= longest <= 28


def test_pictures_and_curve_are_written(tmp_path):
    flow = np.random.default_rng(0).integers(-2, 3, (3, 3, 4, 5, 2))
    files = write_flow_pictures(tmp_path, "flow", flow, np.zeros((3, 16, 20, 3), np.uint8))
    write_loss_curve(tmp_path / "losses.png", np.array([[3.0, 2.0], [np.nan, np.nan]]))
    assert [file.name for file in files] == ["flow_colours.png", "flow_arrows.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flow_arrows.png", "flow_colours.png", "losses.png"]


def test_arrows_are_few_and_have_the_colours_of_the_wheel():
    frame = np.full((240, 360, 3), 200, np.uint8)
    flow = np.zeros((40, 60, 2))
    flow[:, :30, 0] = 4
    flow[:, 30:, 1] = -2
    flow[::7, ::7] = 90  # single wrong matches
    drawn = draw_flow_arrows(frame, flow, largest=4)
    counts = {
        colour: int((np.abs(drawn.astype(int) - colour).max(-1) < 12).sum())
        for colour in map(tuple, flow_colours(np.array([[4.0, 0], [0, -2], [4, 4]]), largest=4).astype(int).tolist())
    }
    right, up, _ = counts.values()
    assert right > 200
    assert up > 100
    left_half, right_half = np.split((drawn != 200).any(-1), 2, axis=1)
    assert 0.02 < left_half.mean() < 0.5
    assert 0.02 < right_half.mean() < 0.5
    assert np.array_equal(draw_flow_arrows(frame, 0.4 * np.ones((40, 60, 2)) * [1, 0]), frame)


def test_full_colour_does_not_hang_on_one_vector():
    flow = np.zeros((20, 30, 2))
    flow[..., 0] = 2
    flow[3, 4] = 50
    assert full_colour_at(flow) == 2
    assert full_colour_at(0 * flow) == 1


def test_a_sheet_of_arrows_is_small(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (13, 60, 90, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    flow = rng.integers(-4, 5, (13, 13, 30, 45, 2))
    _, arrows = write_flow_pictures(tmp_path, "flow", flow, frames)
    assert arrows.stat().st_size < 250_000


def test_videos_stand_beside_each_other(tmp_path):
    red, blue = (
        np.full((frames, 40, 60, 3), colour, np.uint8) for frames, colour in ((3, (220, 30, 30)), (2, (30, 30, 220)))
    )
    write_side_by_side(tmp_path / "both.mp4", {"reference": red, "result": blue}, 8, caption="two")
    video = read_video(tmp_path / "both.mp4").frames
    assert len(video) == 3
    middle = video[2, video.shape[1] // 2].astype(int)
    assert np.abs(middle[60] - (220, 30, 30)).max() < 40
    assert np.abs(middle[-60] - (30, 30, 220)).max() < 40
    with pytest.raises(ValueError, match="videos with frames"):
        write_side_by_side(tmp_path / "none.mp4", {})


def test_losses_stand_at_the_steps_they_belong_to(tmp_path, monkeypatch):
    drawn = {}
    from matplotlib.axes import Axes

    own = Axes.plot

    def plot(self, *data, **options):
        drawn[options.get("label")] = data
        return own(self, *data, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    write_loss_curve(tmp_path / "losses.png", [[3.0, np.nan, 2.0], [2.0, np.nan, 1.0]], first_step=4)
    assert drawn["before the first"][0].tolist() == [4, 5]
    assert list(drawn["before the last"][1]) == [2.0, 1.0]


def test_what_is_no_flow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"displacements \[..., 2\]"):
        flow_colours(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="one frame for each F"):
        write_flow_pictures(tmp_path, "flow", np.zeros((2, 2, 4, 4, 2)), np.zeros((3, 8, 8, 3), np.uint8))
